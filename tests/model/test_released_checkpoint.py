"""A shrunk checkpoint of the released format: write, check, load, run, write again."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longcat_model import presets
from longcat_model.model import LongcatNext
from longcat_model.released import checkpoint
from longcat_model.released.plan import plan
from longcat_model.released.sizes import Sizes, from_json, shrunk, to_json
from longcat_model.released.tensors import entries
from longcat_model.sequence import Inputs

SHARD_BYTES = 200_000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("released") / "next"
    checkpoint.synthesize(shrunk(), directory, seed=1, shard_bytes=SHARD_BYTES)
    return directory


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _inputs(length: int = 12) -> Inputs:
    """A row of text, four cells and three frames."""
    generator, sizes = torch.Generator().manual_seed(3), shrunk().model.vocabulary
    text = torch.randint(3, 260, (1, length), generator=generator)
    visual, audio = torch.full((1, length, 8), -1), torch.full((1, length, 4), -1)
    text[:, 4:8] = -1
    visual[:, 4:8] = torch.randint(0, 8, (1, 4, 8), generator=generator)
    audio[:, 9:] = torch.stack([torch.randint(0, n, (1, 3), generator=generator) for n in sizes.audio_sizes], -1)
    return Inputs(text, torch.full((1, length), -1), visual, audio, torch.zeros(1, length, dtype=torch.int64))


@torch.no_grad()
def _run(model: LongcatNext) -> list[Tensor]:
    """Hidden states, text logits and both heads' logits of every level."""
    hidden = model(_inputs()).hidden
    codes = torch.zeros(12, 8, dtype=torch.int64), torch.zeros(12, 4, dtype=torch.int64)
    levels = model.visual_head.logits(hidden[0], codes[0], model.visual_tables())
    levels += model.audio_head.logits(hidden[0], codes[1], model.audio_tables())
    return [hidden, model.text_logits(hidden), *levels]


def _stems(names: object) -> set[str]:
    return {re.sub(r"\.\d+(?=\.|$)", ".#", name) for name in names}  # type: ignore[attr-defined]


def test_the_shrunk_checkpoint_has_every_pattern(original: Path) -> None:
    released = entries(Sizes(model=presets.longcat_next()))
    index = json.loads((original / checkpoint.INDEX).read_text())
    assert _stems(index["weight_map"]) == _stems(released)
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(entry.bytes for entry in entries(shrunk()).values())
    assert from_json(to_json(shrunk())) == shrunk()


def test_load_run_and_write_back_is_bit_exact(original: Path, tmp_path: Path) -> None:
    released = checkpoint.load(original, progress=False)
    _run(released.model)
    checkpoint.save(released, tmp_path / "again", shard_bytes=SHARD_BYTES, progress=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["again"]
    files = sorted(file.name for file in original.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes(), name


def test_every_tensor_lands_where_its_name_says(original: Path) -> None:
    """The model computes what one built from the files by hand does, buffers that no file holds included."""
    stored: dict[str, Tensor] = {}
    for shard in original.glob("*.safetensors"):
        stored |= load_file(shard)
    released = checkpoint.load(original, progress=False)
    own = LongcatNext(shrunk().model).eval()
    values = {}
    for name in own.state_dict():
        layer = name.replace("backbone.", "model.").rpartition(".")[0]
        experts = [
            [stored.get(f"{layer}.experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(4)
        ]
        if name.endswith("gate_up"):
            values[name] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])  # type: ignore[list-item]
        elif name.endswith("mlp.down"):
            values[name] = torch.stack([down for _, _, down in experts])  # type: ignore[misc]
        else:
            (values[name],) = (
                stored[f"{prefix}{name.removeprefix(part)}"]
                for prefix, part in (
                    ("", ""),
                    ("model.", ""),
                    ("model.", "backbone."),
                    ("model.ngram_embeddings.", "ngram."),
                    ("model.visual_tokenizer.visual_embedding_layer.", ""),
                )
                if f"{prefix}{name.removeprefix(part)}" in stored and (part == "" or name.startswith(part))
            )
    own.load_state_dict(values, assign=True)
    for got, expected in zip(_run(released.model), _run(own), strict=True):
        assert torch.equal(got, expected)
        assert got.float().abs().max() > 0


def test_all_faults_are_listed_at_once_before_anything_is_allocated(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, *_ = shards = sorted(copy.glob("*.safetensors"))
    tensors = load_file(first)
    gone, bent, cast = list(tensors)[:3]
    del tensors[gone]
    tensors[bent] = tensors[bent].flatten()[:-1]
    tensors[cast] = tensors[cast].to(torch.float16)
    tensors["model.wings.weight"] = torch.zeros(2)
    save_file(tensors, first)
    cut = max(json.loads(_header(third)).items(), key=lambda item: item[1].get("data_offsets", [0, 0])[1])[0]
    third.write_bytes(third.read_bytes()[:-1])
    absent = list(load_file(second))
    second.unlink()
    broken = shards[3]
    broken.write_bytes(b"\x40" + bytes(9))
    index = json.loads((copy / checkpoint.INDEX).read_text())
    moved, forgotten = list(load_file(shards[4]))[:2]
    index["weight_map"] |= {"model.tail.weight": first.name, moved: first.name}
    del index["weight_map"][forgotten]
    (copy / checkpoint.INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(checkpoint, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=f"{copy} has [0-9]+ faults") as caught:
        checkpoint.load(copy, progress=False)
    lines = str(caught.value).splitlines()
    for start in (
        f"{gone}: missing",
        f"{bent}: shape must be",
        f"{cast}: type must be torch.bfloat16, got F16",
        "model.wings.weight: extra",
        f"{cut}: truncated",
        f"{second.name}: missing file",
        f"{broken.name}: truncated in its header",
        "model.tail.weight: extra, in the index, and in no shard",
        f"{moved}: in {shards[4].name}, but the index says {first.name}",
        f"{forgotten}: in {shards[4].name}, but not in the index",
        *(f"{name}: missing" for name in absent),
    ):
        assert sum(line.strip().startswith(start) for line in lines) == 1, start


def _header(shard: Path) -> bytes:
    content = shard.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _damage(header: dict[str, Any], how: str) -> bytes:
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    first, second = names[:2]
    if how == "no type":
        del header[first]["dtype"]
    elif how == "type of another kind":
        header[first]["dtype"] = ["BF16"]
    elif how == "overlap":
        header[second]["data_offsets"] = [offset - 2 for offset in header[second]["data_offsets"]]
    elif how == "before the file":
        header[first]["data_offsets"] = [offset - 64 for offset in header[first]["data_offsets"]]
    elif how.startswith("metadata"):
        header["__metadata__"] = 5 if how == "metadata of another kind" else {"format": 5}
    elif how == "nested":
        return b'{"a":' * 20_000
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}" if how == "twice" else text).encode()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no type", "damaged header: 'dtype'"),
        ("type of another kind", r"type must be torch\.\w+, got \['BF16'\]"),
        ("overlap", r"damaged header: bytes \d+ to \d+ where those from \d+ on belong"),
        ("before the file", "damaged header: bytes -64 to"),
        ("nested", "damaged header: maximum recursion"),
        ("metadata of another kind", "damaged header: __metadata__ must map names to strings"),
        ("metadata of numbers", "damaged header: __metadata__ must map names to strings"),
        ("twice", "damaged header: a name stands twice"),
        ("longer", "damaged header: 2 bytes too many"),
        ("directory", "unreadable: Is a directory"),
    ],
)
def test_damaged_headers_are_refused_before_anything_is_allocated(
    copy: Path, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    shard = min(copy.glob("*.safetensors"))
    text, content = _header(shard), shard.read_bytes()
    damaged = _damage(json.loads(text), how)
    shard.write_bytes(len(damaged).to_bytes(8, "little") + damaged + content[8 + len(text) :])
    if how == "longer":
        shard.write_bytes(content + bytes(2))
    elif how == "directory":
        shard.unlink()
        shard.mkdir()
    monkeypatch.setattr(checkpoint, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(copy, progress=False)


def test_the_current_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for directory in (Path("."), Path("../here")):
        with pytest.raises(ValueError, match="must be another directory than the current one, got /"):
            checkpoint.synthesize(shrunk(), directory)


def test_a_directory_that_holds_something_else(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        checkpoint.check(tmp_path / "empty")
    with pytest.raises(ValueError, match="must be a new or empty directory"):
        checkpoint.synthesize(shrunk(), copy)
    index = json.loads((copy / checkpoint.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (copy / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files beside it"):
        checkpoint.check(copy)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("num_layers", 10**9, "num_layers must be at most 1024, got 1000000000"),
        ("n_routed_experts", 10**9, r"num_layers \* n_routed_experts must be at most 262144, got 2000000000"),
        ("emb_split_num", 10**6, r"emb_neighbor_num \* emb_split_num must be at most 1024"),
        ("visual_config.vq_config.depth", 10**9, "vq_config.depth must be at most 1024"),
        ("visual_config.depth", 10**6, "visual_config.depth must be at most 1024"),
        ("longcat_kernels.refiner.layers", 10**6, "refiner.layers must be at most 1024"),
        ("longcat_kernels.pixel_decoder.depth", 10**6, "pixel_decoder.depth must be at most 1024"),
        ("num_layers", 10**30, r"num_layers must be an integer in \[0, 2\^31\), got 1000"),
        ("num_layers", -1, r"num_layers must be an integer in \[0, 2\^31\), got -1"),
        ("text_vocab_size", "8", r"text_vocab_size must be an integer in \[0, 2\^31\), got '8'"),
        ("audio_config.vq_config.codebook_sizes", 8, "codebook_sizes must be a list of integers"),
        ("rope_theta", float("nan"), "rope_theta must be a finite number"),
        ("longcat_kernels", [1], r"longcat_kernels must be an object, got \[1\]"),
        ("kv_lora_rank", 0, "sizes must be those of a model, got: .*zero"),
        ("visual_config.image_head_transformer_dims", 10**9, "sizes must be those of a model, got: .*overflow"),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(copy: Path, path: str, value: object, rule: str) -> None:
    values = json.loads((copy / "config.json").read_text())
    *parents, last = path.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    (copy / "config.json").write_text(json.dumps(values))
    began = time.process_time()
    with pytest.raises(ValueError, match=rule):
        checkpoint.check(copy)
    assert time.process_time() - began < 5


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    table, asked = entries(shrunk()), []

    def tensor_of(name: str) -> Tensor:
        asked.append(name)
        if len(asked) > len(table) - 5:
            raise OSError("disk full")
        return torch.zeros(table[name].shape, dtype=table[name].dtype)

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(shrunk(), tmp_path / "out", tensor_of, shard_bytes=SHARD_BYTES, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_loaded_by_a_plan_gives_the_same_bits(original: Path, tmp_path: Path) -> None:
    """Its tables are mapped from their files."""
    mapped = checkpoint.load(original, plan(checkpoint.check(original)[0], {}).placement, progress=False)
    for got, expected in zip(_run(mapped.model), _run(checkpoint.load(original, progress=False).model), strict=True):
        assert torch.equal(got, expected)
    checkpoint.save(mapped, tmp_path / "again", shard_bytes=SHARD_BYTES, progress=False)
    for file in original.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_mapped_tables_need_neither_a_fixed_directory_nor_their_names(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path into a cache whose files are links to others, all deleted while the model is in use."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(original.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
    monkeypatch.chdir(tmp_path)
    mapped = checkpoint.load(Path("snapshots/main"), plan(shrunk(), {}).placement, progress=False)
    monkeypatch.chdir("/")
    for file in blobs.iterdir():
        file.unlink()
    for got, expected in zip(_run(mapped.model), _run(checkpoint.load(original, progress=False).model), strict=True):
        assert torch.equal(got, expected)
