"""ResidualVQ over several processes: every rank ends with the bits of one process that saw all rows, two collectives
a step. Four processes run every case once; a case of two ranks runs in a group of the first two."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat_kernels.integrations import vector_quantize_pytorch
from longcat_kernels.modules import ResidualVQ, _codebook
from longcat_kernels.modules._gather import Ranks

COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend"))
    and callable(getattr(dist, name))
    and name not in ("reduce_op",)
]


@dataclass(frozen=True)
class Case:
    """Rows of each rank, a tuple a step."""

    steps: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    masked: bool = False
    drop_in: bool = False  # the ResidualVQ of the integration
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.steps[0])

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """All rows of a step, and which of them count."""
        g = torch.Generator().manual_seed(step)
        rows = sum(self.steps[step])
        x = torch.randn(rows, 6, generator=g).to(self.dtype)
        if self.masked:
            x[::11] = torch.nan
        return x, torch.rand(rows, generator=g) < 0.6 if self.masked else None

    def share(self, step: int, rank: int) -> tuple[Tensor, Tensor | None]:
        x, mask = self.batch(step)
        return x.split(self.steps[step])[rank], None if mask is None else mask.split(self.steps[step])[rank]

    def module(self, sync: Any) -> Any:
        torch.manual_seed(0)
        if self.drop_in:
            module = vector_quantize_pytorch.ResidualVQ(dim=6, codebook_size=(16, 16, 16), **self.options)
            module.ranks = Ranks(sync)
            return module
        return ResidualVQ([16, 16, 16], 6, **{"decay": 0.8, "kmeans_steps": 3, **self.options}, sync=sync)


CASES = {
    "uneven": Case(((20, 7), (3, 30), (9, 9))),
    "no rows on one rank": Case(((0, 25), (12, 0), (0, 8))),
    "no rows anywhere": Case(((0, 0), (9, 8), (0, 0), (3, 3))),
    "masked": Case(((40, 21), (15, 30), (9, 9)), masked=True),
    "shared": Case(((20, 7), (3, 30), (9, 9)), options={"shared": True}),
    "four ranks, bfloat16": Case(
        ((9, 0, 14, 3), (1, 2, 3, 4), (8, 8, 8, 8)), torch.bfloat16, options={"residual_dtype": torch.bfloat16}
    ),
    "four ranks, shared, masked, float16": Case(
        ((9, 30, 14, 3), (21, 0, 3, 4)), torch.float16, masked=True, options={"shared": True}
    ),
    "restarts by the mean count": Case(
        ((20, 7), (3, 30), (9, 9)),
        options={"restart_threshold": 0.0, "restart_fraction": 0.7, "restart_count": 0.0, "kmeans_init": False},
    ),
    "drop-in": Case(
        ((40, 21), (15, 0), (9, 9)),
        masked=True,
        drop_in=True,
        options={"kmeans_init": True, "threshold_ema_dead_code": 1, "quantize_dropout": True},
    ),
    "shared drop-in": Case(
        ((20, 7), (0, 30)), drop_in=True, options={"shared_codebook": True, "threshold_ema_dead_code": 2}
    ),
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    pair = dist.new_group([0, 1])
    called: Counter[str] = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, counting(getattr(dist, name), called, name))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if rank < case.ranks:
            module = case.module(True if case.ranks == 4 else pair)
            results[name] = [run_step(case, module, step, rank, called) for step in range(len(case.steps))]
    if rank < 2:
        results["alone"] = run_step(CASES["uneven"], CASES["uneven"].module(False), 0, rank, called)
        results["copy"] = run_step(CASES["uneven"], copy.deepcopy(CASES["uneven"].module(pair)), 0, rank, called)
        results["refusals"] = [refusal(rank, pair, *which) for which in ((True, False), (False, True))]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def counting(function: Any, called: Counter[str], name: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return function(*args, **kwargs)

    return counted


def run_step(case: Case, module: Any, step: int, rank: int, called: Counter[str]) -> dict[str, Any]:
    called.clear()
    x, mask = case.share(step, rank)
    codes = codes_of(module, x, mask)
    return {"collectives": called.total(), "codes": codes, "state": copy.deepcopy(module.state_dict())}


def codes_of(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return module(x, mask).codes if isinstance(module, ResidualVQ) else module(x, mask)[1]


def refusal(rank: int, pair: Any, other_dtype: bool, other_step: bool) -> str:
    """The error where the second rank has another dtype, or is at another step."""
    module = CASES["uneven"].module(pair)
    if other_step:
        module.step.fill_(rank)
    with pytest.raises(ValueError) as caught:
        module(torch.randn(4, 6, dtype=torch.bfloat16 if other_dtype and rank else torch.float32))
    return str(caught.value)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the four processes has to say."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_bits_of_one_process(
    name: str, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    restarted: list[int] = []
    update = _codebook.ema_update
    monkeypatch.setattr(_codebook, "ema_update", lambda *a, **k: restarted.append(int(update(*a, **k))))
    single = case.module(True)
    for step in range(len(case.steps)):
        codes = codes_of(single, *case.batch(step)).split(case.steps[step])
        if step == 0:
            restarted.clear()  # those of k-means
        for rank in range(case.ranks):
            got = ranks[rank][name][step]
            assert torch.equal(got["codes"], codes[rank])
            for key, value in single.state_dict().items():
                assert torch.equal(got["state"][key], value), (rank, step, key)
                assert not value.is_floating_point() or value.isfinite().all()
    assert sum(restarted) > 0


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_two_collectives(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in range(CASES[name].ranks):
        assert [step["collectives"] for step in ranks[rank][name]] == [2] * len(CASES[name].steps)


def test_without_sync_each_process_is_by_itself(ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        single = CASES["uneven"].module(True)
        single(*CASES["uneven"].share(0, rank))
        got = ranks[rank]["alone"]
        assert got["collectives"] == 0
        assert all(torch.equal(got["state"][key], value) for key, value in single.state_dict().items())


def test_a_copy_is_of_the_same_group(ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        copied, made = ranks[rank]["copy"], ranks[rank]["uneven"][0]
        assert copied["collectives"] == 2
        assert all(torch.equal(copied["state"][key], value) for key, value in made["state"].items())


def test_all_ranks_refuse_what_does_not_fit_together(ranks: list[dict[str, Any]]) -> None:
    for of_dtype, of_step in (ranks[0]["refusals"], ranks[1]["refusals"]):
        assert of_dtype.startswith(
            "ResidualVQ: all ranks must have rows of one dtype and width and be in the same state"
        )
        assert of_dtype.endswith("[[4, 0, 6, 0, 0], [4, 1, 6, 0, 0]]")
        assert of_step.endswith("[[4, 0, 6, 0, 0], [4, 0, 6, 0, 1]]")
