"""Experts over several ranks: outputs and gradients of one process with all tokens and experts, a fixed number of
collectives, the same bits again. Four processes run every case once; a case of two ranks runs in the first two."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat_kernels import fused_moe
from longcat_kernels.modules import ExpertParallel, MoE
from longcat_kernels.testing import assert_close

DIM, WIDTH, EXPERTS, ZERO, SLOTS = 16, 12, 8, 3, 4


@dataclass(frozen=True)
class Case:
    """Tokens of each rank; `ids` says which experts they have."""

    tokens: tuple[int, ...]
    ids: str = "any"
    dtype: torch.dtype = torch.float32

    @property
    def inner(self) -> float:
        """Narrow dtypes round pre-activations, activations, their gradients and each rank's part of a sum."""
        return 0.0 if self.dtype.itemsize >= 4 else torch.finfo(self.dtype).eps

    def all(self) -> dict[str, Tensor]:
        """Arguments of `fused_moe` for all tokens and experts."""
        g = torch.Generator().manual_seed(sum(self.tokens))
        count = sum(self.tokens)
        ids = torch.randint(-1, EXPERTS + ZERO, (count, SLOTS), generator=g)
        if self.ids == "identity":
            ids = ids % ZERO + EXPERTS
        elif self.ids == "none":
            ids = torch.full_like(ids, -1)
        elif self.ids == "none of the NaN token":
            ids[0] = -1
        elif self.ids == "of the last rank":
            ids = ids.clamp_min(0) % (EXPERTS // len(self.tokens)) + EXPERTS - EXPERTS // len(self.tokens)
        floats = {
            "x": torch.randn(count, DIM, generator=g),
            "gate_up": torch.randn(EXPERTS, 2 * WIDTH, DIM, generator=g) / DIM**0.5,
            "down": torch.randn(EXPERTS, DIM, WIDTH, generator=g) / WIDTH**0.5,
        }
        weights = torch.rand(count, SLOTS, generator=g).to(torch.promote_types(self.dtype, torch.float32))
        if self.ids == "none of the NaN token":
            floats["x"][0] = torch.nan
        floats = {name: value.to(self.dtype).requires_grad_() for name, value in floats.items()}
        return {**floats, "ids": ids, "weights": weights.requires_grad_()}

    def grad(self) -> Tensor:
        """Of all outputs."""
        return torch.randn(sum(self.tokens), DIM, generator=torch.Generator().manual_seed(9)).to(self.dtype)

    def share(self, whole: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """What a rank has of them."""
        ranks = len(self.tokens)
        parts = {
            name: value.detach().split(self.tokens if name in ("x", "ids", "weights") else EXPERTS // ranks)[rank]
            for name, value in whole.items()
        }
        return {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in parts.items()}


CASES = {
    "two ranks": Case((13, 6)),
    "four ranks, uneven": Case((9, 1, 14, 3)),
    "ranks without tokens": Case((0, 11, 0, 5)),
    "no tokens anywhere": Case((0, 0, 0, 0)),
    "identity experts only": Case((5, 3), "identity"),
    "no expert at all": Case((5, 3), "none"),
    "NaN that no expert has": Case((5, 3), "none of the NaN token"),
    "all on one rank": Case((7, 2, 0, 6), "of the last rank"),
    "float64": Case((9, 1, 14, 3), dtype=torch.float64),
    "bfloat16": Case((9, 1, 14, 3), dtype=torch.bfloat16),
    "bfloat16, ranks without tokens": Case((0, 11, 0, 5), dtype=torch.bfloat16),
}
LEAVES = ("x", "gate_up", "down", "weights")


def run(case: Case, group: Any, rank: int, called: Counter[str]) -> dict[str, Any]:
    arguments = case.share(case.all(), rank)
    grad = case.grad().split(case.tokens)[rank]
    called.clear()
    out = ExpertParallel(group, EXPERTS).fused_moe(**arguments)
    forward = called.total()
    grads = torch.autograd.grad(out, [arguments[name] for name in LEAVES], grad)
    return {"out": out.detach(), "grads": grads, "collectives": (forward, called.total() - forward)}


def module_step(group: Any, x: Tensor) -> dict[str, Any]:
    torch.manual_seed(5)
    module = copy.deepcopy(MoE(DIM, WIDTH, EXPERTS, ZERO, SLOTS, scale=2.0, group=group))
    routed = module(x)
    routed.output.square().sum().backward()
    return {"output": routed.output.detach(), **{name: p.grad for name, p in module.named_parameters()}}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    pair, world = dist.new_group([0, 1]), dist.group.WORLD
    called: Counter[str] = Counter()
    for name in dir(dist):
        if name.startswith(("all_", "broadcast", "reduce_", "gather", "scatter", "barrier", "send", "recv", "isend")):
            setattr(dist, name, counting(getattr(dist, name), called, name))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if rank < len(case.tokens):
            group = world if len(case.tokens) == 4 else pair
            results[name] = [run(case, group, rank, called) for _ in range(2)]
    results["module"] = module_step(world, module_input()[rank])
    results["refusals"] = refusals(world)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def refusals(world: Any) -> list[str]:
    """What the first rank says, alone: a call that sent anything would wait for the others."""
    if dist.get_rank() > 0:
        return []
    good = CASES["four ranks, uneven"].share(CASES["four ranks, uneven"].all(), 0)
    changes: list[dict[str, Any]] = [
        {"gate_up": good["gate_up"].repeat(2, 1, 1), "down": good["down"].repeat(2, 1, 1)},
        {"ids": good["ids"].int()},
        {"weights": good["weights"][:, 1:]},
        {"x": good["x"][:, 1:]},
        {"down": good["down"].double()},
    ]
    calls: list[Callable[[], Any]] = [lambda: ExpertParallel(world, 6)]
    calls += [partial(ExpertParallel(world, EXPERTS).fused_moe, **{**good, **change}) for change in changes]
    found = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        found.append(str(caught.value))
    return found


def counting(function: Any, called: Counter[str], name: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return function(*args, **kwargs)

    return counted


def module_input() -> tuple[Tensor, ...]:
    return torch.randn(24, DIM, generator=torch.Generator().manual_seed(6)).split([10, 0, 9, 5])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the four processes has to say."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Within the usual error of the dtype: only the order of at most k + 1 terms, and of rows in a product, differs."""
    case = CASES[name]
    truth = {key: value.detach().double() if value.is_floating_point() else value for key, value in case.all().items()}
    for key in LEAVES:
        truth[key].requires_grad_()
    out = fused_moe(**truth)
    grads = dict(
        zip(LEAVES, torch.autograd.grad(out, [truth[key] for key in LEAVES], case.grad().double()), strict=True)
    )
    got = [ranks[rank][name][0] for rank in range(len(case.tokens))]
    assert_close(torch.cat([rank["out"] for rank in got]), out, inner=case.inner)
    for index, key in enumerate(LEAVES):
        assert_close(torch.cat([rank["grads"][index] for rank in got]), grads[key], inner=case.inner)
    if case.dtype == torch.float64:
        torch.testing.assert_close(torch.cat([rank["out"] for rank in got]), out.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_again_by_a_fixed_number_of_collectives(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in range(len(CASES[name].tokens)):
        first, again = ranks[rank][name]
        assert first["collectives"] == again["collectives"] == (5, 3)
        assert torch.equal(first["out"], again["out"])
        assert all(torch.equal(a, b) for a, b in zip(first["grads"], again["grads"], strict=True))


def test_module_equals_the_module_of_one_process(ranks: list[dict[str, Any]]) -> None:
    single = module_step(None, torch.cat(module_input()))
    shares = [rank["module"] for rank in ranks]
    assert_close(torch.cat([share["output"] for share in shares]), single["output"])
    for name in ("gate_up", "down"):
        assert_close(torch.cat([share[name] for share in shares]), single[name])
    router = "router.classifier.weight"
    assert_close(sum(share[router] for share in shares), single[router])


def test_refuses_wrong_arguments_before_anything_is_sent(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refusals"] == [
        "ExpertParallel: experts must be a multiple of the 4 ranks, got 6",
        "ExpertParallel: gate_up must have the 2 experts of this rank, got 4",
        "fused_moe: ids must be int64 [9, k] with k >= 1, got torch.int32 [9, 4]",
        "fused_moe: weights must be floating point [9, 4], got torch.float32 [9, 3]",
        "fused_moe: gate_up must be [E, 2 F, 15] with E >= 1, got [2, 24, 16]",
        "fused_moe: down must have the dtype of x, torch.float32, got torch.float64",
    ]
