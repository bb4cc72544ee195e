"""Placement plans add up, follow the GPUs' memory, and a model loaded by one computes the same bits in less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_kernels.modules import MoE
from longcat_model import config, presets
from longcat_model.backbone import Backbone, Cache
from longcat_model.cli import main
from longcat_model.model import LongcatNext
from longcat_model.released import checkpoint
from longcat_model.released import plan as planning
from longcat_model.released.place import empty, visit
from longcat_model.released.plan import (
    FILE,
    HOST,
    RESERVE,
    Placement,
    activation_bytes,
    decoder_bytes,
    plan,
    table_bytes,
)
from longcat_model.released.sizes import Sizes, VAESizes, VocoderSizes, shrunk, to_json
from longcat_model.released.tensors import entries
from longcat_model.sequence import Inputs

MB, GB = 10**6, 10**9
RELEASED = Sizes(model=presets.longcat_next())
TABLES, TOTAL = 62_813_970_432, 150_825_367_872  # bytes of the n-gram tables and of the whole checkpoint


def test_one_gpu_holds_all_but_the_tables() -> None:
    found = plan(RELEASED)
    assert found.placement == Placement(
        main="cuda:0", tables=FILE, experts=("cuda:0",) * 14, vision="cuda:0", audio="cuda:0"
    )
    working = sum(part.bytes for part in found.parts if part.name.startswith(("cache", "activations", "reserve")))
    decoders = sum(decoder_bytes(RELEASED).values())
    assert (found.used(FILE), found.used(HOST)) == (TABLES, 0)
    assert found.used("cuda:0") == TOTAL - TABLES + decoders + working < 141 * GB
    # The two files hold 10.33 GB; about 0.2 GB of the image decoder's are not accounted for by its public sizes.
    assert decoders == pytest.approx(10.1e9, rel=0.005)
    assert not found.lacking()
    backbone = RELEASED.model.backbone
    assert table_bytes(backbone) == 6144
    assert Cache.position_bytes(backbone, torch.bfloat16) == 32_256 + 16  # latents; and a document number and a text id


def test_smaller_gpus_leave_experts_to_the_next_and_then_to_the_host() -> None:
    one = plan(RELEASED, {"cuda:0": 80 * GB}).placement
    assert one.experts == ("cuda:0",) * 12 + (HOST,) * 2
    assert (one.main, one.vision) == ("cuda:0", HOST)
    two = plan(RELEASED, {"cuda:0": 80 * GB, "cuda:1": 24 * GB})
    assert two.placement.experts == ("cuda:0",) * 12 + ("cuda:1",) * 2
    assert (two.placement.vision, two.placement.audio) == ("cuda:1", "cuda:1")
    assert not two.lacking()


def test_what_does_not_fit_is_said_in_bytes() -> None:
    found = plan(RELEASED, {"cuda:0": 16 * GB})
    assert set(found.placement.experts) == {HOST}
    assert found.lacking() == {"cuda:0": found.used("cuda:0") - 16 * GB} and found.lacking()["cuda:0"] > 0


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What takes longer to count than to plan."""
    return {"entries": entries(shrunk()), "decoder_bytes": decoder_bytes(shrunk())}


@given(
    memory=st.lists(st.integers(RESERVE, RESERVE + 2_000_000), max_size=3),
    rows=st.integers(1, 4),
    positions=st.integers(1, 200),
)
@settings(deadline=None, max_examples=100)
def test_a_plan_places_every_tensor_once_and_overfills_nothing_by_choice(
    made: dict[str, Any], memory: list[int], rows: int, positions: int
) -> None:
    gpus = {f"cuda:{i}": size for i, size in enumerate(memory)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.items():
            patch.setattr(planning, name, lambda _, value=value: value)
        found = plan(shrunk(), gpus, rows=rows, positions=positions)
    weights = [p for p in found.parts if not p.name.startswith(("cache", "activations", "reserve"))]
    stored = sum(entry.bytes for entry in made["entries"].values()) + sum(made["decoder_bytes"].values())
    assert sum(p.bytes for p in weights) == stored
    assert len({part.name for part in weights}) == len(weights)
    assert set(found.lacking()) <= {"cuda:0"}
    if found.lacking():
        assert "cuda:0" not in (*found.placement.experts, found.placement.vision, found.placement.audio)
    for part in found.parts:  # nothing is on the host that had fit a GPU in the end
        if gpus and part.place == HOST:
            assert all(found.used(gpu) + part.bytes > size for gpu, size in gpus.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "plan: rows must be at least 1, got 0"),
        ({"positions": -1}, "plan: positions must be at least 1, got -1"),
        ({"memory": {"cuda:0": 0}}, "plan: cuda:0 must be at least 1, got 0"),
    ],
)
def test_refuses_impossible_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(shrunk(), **options)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "longcat_next", "--plan", "--memory", "80e9"]) == 0
    printed = capsys.readouterr().out
    found = plan(RELEASED, {"cuda:0": 80 * GB})
    rows = {line.split("  ")[0]: line.split()[-2:] for line in printed.splitlines() if line}
    assert rows["n-gram tables"] == [FILE, f"{TABLES:,}"]
    assert rows["experts of layers 0 to 11"] == ["cuda:0", f"{12 * 4_836_558_336:,}"]
    assert rows["experts of layers 12 to 13"] == [HOST, f"{2 * 4_836_558_336:,}"]
    assert rows["cuda:0"] == [f"{found.used('cuda:0'):,}", f"{80 * GB:,}"]
    assert "DOES NOT FIT" not in printed
    assert main(["inspect", "longcat_next", "--plan", "--memory", "16e9"]) == 0
    assert "DOES NOT FIT: cuda:0 lacks" in capsys.readouterr().out


def test_the_command_reads_a_checkpoint_and_names_its_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.synthesize(shrunk(), tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--plan", "--memory", "0"]) == 0
    planned = capsys.readouterr().out
    assert "experts of layers 0 to 1" in planned and "cuda" not in planned
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "model.lm_head" in capsys.readouterr().out
    next((tmp_path / "a").glob("*.safetensors")).write_bytes(b"")
    assert main(["inspect", str(tmp_path / "a"), "--plan"]) == 2
    assert "truncated in its header" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--plan"], "--plan needs a released checkpoint's directory or longcat_next, got 'demo'"),
        (["longcat_next", "--plan", "--memory", "nan"], "memory must be bytes of each GPU, got nan"),
        (["longcat_next", "--plan", "--rows", "0"], "rows must be at least 1, got 0"),
    ],
)
def test_the_command_refuses_what_it_cannot_plan(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of ops held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (reference := StorageWeakRef(x.untyped_storage())) not in known:
                self.live[reference] = x.untyped_storage().nbytes()
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("positions", [256, 1024])
def test_activations_are_about_what_ops_hold(positions: int) -> None:
    sizes = config.Backbone(
        hidden=192, layers=2, ffn_width=384, ngram=None,
        attention=config.Attention(heads=4, q_rank=96, kv_rank=32, nope_dim=64, rope_dim=32, value_dim=64),
        experts=config.Experts(real=8, zero=4, top_k=6, width=64),
    )  # fmt: skip
    backbone = Backbone(sizes).bfloat16().eval()
    cache = Cache.empty(sizes, 1, positions, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        backbone(torch.zeros(1, positions, 192, dtype=torch.bfloat16), torch.zeros(1, positions).long(), cache)
    assert live.most <= activation_bytes(sizes, positions) <= 3 * live.most


def test_experts_elsewhere_get_their_positions_and_give_them_back() -> None:
    """With imitated GPUs, on which an op between two devices is an error."""
    with FakeTensorMode(), torch.no_grad():
        moe = MoE(hidden=8, width=4, real=4, zero=2, top_k=2, scale=6.0)
        x = torch.empty(3, 8, device="cuda:0")
        with pytest.raises(RuntimeError, match="device"):
            moe(x)
        visit(moe, "cpu", "cuda:0")
        assert {str(part.device) for part in moe(x)} == {"cuda:0"}


def test_a_model_is_made_where_its_placement_says() -> None:
    model = empty(shrunk(), Placement(tables=FILE, experts=("cpu", "meta")))
    places = {name: str(parameter.device) for name, parameter in model.named_parameters()}
    apart = ("ngram.embedders.", "backbone.layers.1.mlp.")
    assert {name for name, place in places.items() if place == "meta"} == {n for n in places if n.startswith(apart)}
    assert [bool(layer.mlp._forward_hooks) for layer in model.backbone.layers] == [False, True]  # type: ignore[union-attr]


def test_tokenizers_go_where_the_placement_says(tmp_path: Path) -> None:
    checkpoint.synthesize(shrunk(), tmp_path / "a")
    released = checkpoint.load(tmp_path / "a", Placement(audio="meta"), progress=False)
    assert {name for name, x in released.tokenizers.items() if x.is_meta} == {
        name for name in released.tokenizers if name.startswith("model.audio_tokenizer.")
    }
    assert not any(parameter.is_meta for parameter in released.model.parameters())


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(experts=("cpu",)), r"placement\.experts must be one place a layer \(2\), got 1"),
        (Placement(vision="cuda:77"), "placement must name devices here, got 'cuda:77'"),
        (Placement(main="gpu"), "placement must name devices here, got 'gpu'"),
        (Placement(tables="cuda:1"), r"placement\.tables must be 'file', 'cpu' or main 'cpu', got 'cuda:1'"),
    ],
)
def test_refuses_a_placement_that_no_model_can_have(placement: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty(shrunk(), placement)


# Memory, as the operating system counts it


measured = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory: measured through /proc")


def growth(run: Callable[[], object]) -> int:
    """By how many bytes the process was larger at its largest during the call than before; mapped files count.

    Tensors should be above 32 MB: then malloc maps each one afresh, whatever was freed before.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def large(table_bytes: int) -> Sizes:
    """The shrunk sizes with n-gram tables of about so many bytes together."""
    sizes = shrunk()
    assert sizes.model.backbone.ngram is not None
    row = 2 * sizes.model.backbone.hidden // sizes.model.backbone.ngram.tables
    rows = table_bytes // sizes.model.backbone.ngram.tables // row // 260 * 260
    ngram = replace(sizes.model.backbone.ngram, rows=rows)
    return replace(sizes, model=replace(sizes.model, backbone=replace(sizes.model.backbone, ngram=ngram)))


def write_sparse(sizes: Sizes, directory: Path) -> None:
    """A checkpoint of zeros, a shard a table and one for the rest: files with holes, which take no disk."""
    shards: dict[str, dict[str, Any]] = {}
    places = {}
    for name, entry in entries(sizes).items():
        number = name.split(".")[3] if ".embedders." in name else "rest"
        places[name] = shard = f"model-{number}.safetensors"
        header = shards.setdefault(shard, {})
        start = max((other["data_offsets"][1] for other in header.values()), default=0)
        dtype = "BF16" if entry.dtype is torch.bfloat16 else "F32"
        header[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [start, start + entry.bytes]}
    for shard, header in shards.items():
        text = json.dumps(header).encode()
        with (directory / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(described["data_offsets"][1] for described in header.values()))
    (directory / checkpoint.INDEX).write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps(to_json(sizes)))


@torch.no_grad()
def _run(model: LongcatNext) -> Tensor:
    text = torch.arange(3, 11)[None]
    nothing = torch.full((1, 8), -1)
    return model(
        Inputs(text, nothing, nothing[..., None].expand(1, 8, 8), nothing[..., None].expand(1, 8, 4), 0 * text)
    ).hidden


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported and made once is there before anything is measured."""
    directory = tmp_path_factory.mktemp("warm") / "up"
    checkpoint.synthesize(shrunk(), directory)
    _run(checkpoint.load(directory, progress=False).model)


@measured
@pytest.mark.usefixtures("warm")
def test_memory_does_not_grow_with_mapped_tables(tmp_path: Path) -> None:
    def run(placement: Placement) -> Callable[[], object]:
        return lambda: _run(checkpoint.load(directory, placement, progress=False).model)

    grown = {}
    for size in (60 * MB, 480 * MB):
        (directory := tmp_path / str(size)).mkdir()
        write_sparse(large(size), directory)
        grown[size] = growth(run(Placement(tables=FILE)))
    assert grown[480 * MB] < grown[60 * MB] + 30 * MB
    assert growth(run(Placement())) > 480 * MB  # what would be seen


@measured
@pytest.mark.usefixtures("warm")
def test_loading_holds_one_shard_besides_the_model(tmp_path: Path) -> None:
    write_sparse(large(480 * MB), tmp_path)  # 40 MB a shard
    assert 480 * MB < growth(lambda: checkpoint.load(tmp_path, progress=False)) < (480 + 40 + 20) * MB


@measured
@pytest.mark.usefixtures("warm")
def test_writing_holds_one_shard(tmp_path: Path) -> None:
    sizes, shard = large(432 * MB), 72 * MB  # two tables a shard
    table = entries(sizes)

    def tensor_of(name: str) -> Tensor:
        return torch.ones(table[name].shape, dtype=table[name].dtype)

    def run() -> None:
        checkpoint.write(sizes, tmp_path / "out", tensor_of, shard_bytes=shard, progress=False)

    assert shard - 20 * MB < growth(run) < shard + 20 * MB


def test_decoders_that_no_sizes_make_are_refused() -> None:
    for wrong in (
        replace(shrunk(), vae=VAESizes(widths=(10**9,) * 4)),
        replace(shrunk(), vocoder=VocoderSizes(rates=())),
    ):
        with pytest.raises(ValueError, match="released: sizes must be those of a model, got: "):
            plan(wrong)
