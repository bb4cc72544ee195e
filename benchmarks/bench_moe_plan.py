"""moe_plan against torch's sorts: which rows each expert computes, from the ids of a router."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Call, Case, Contender, WrongResult
from longcat_kernels import moe_plan
from longcat_kernels.reference import moe_plan as spec

Plan = tuple[Tensor, Tensor]  # rows of each expert [E]; flat slots of all rows, by expert


def by_sort(ids: Tensor, case: spec.Case) -> Plan:
    """A stable sort of the slots' experts."""
    key_R = ids.flatten()
    counts = torch.bincount(key_R, minlength=case.real + case.zero)[: case.real]
    return counts, key_R.argsort(stable=True)


def by_one_hot(ids: Tensor, case: spec.Case) -> Plan:
    """A matrix of slots by experts, summed along the slots: a counting sort without a sort."""
    key_R = ids.flatten()
    hits_RE = F.one_hot(key_R, case.real + case.zero)
    counts_E = hits_RE.sum(0)
    place_R = (hits_RE.cumsum(0).gather(1, key_R[:, None])[:, 0] - 1) + (counts_E.cumsum(0) - counts_E)[key_R]
    slots_R = torch.empty_like(key_R).scatter_(0, place_R, torch.arange(len(key_R), device=ids.device))
    return counts_E[: case.real], slots_R


def contenders(case: spec.Case, device: str) -> list[Contender]:
    """Ours, which also gives tiles and the way back, and two that do not."""
    ids = spec.inputs(case, device)["ids"]
    truth = moe_plan(ids, case.real, tile=case.tile, backend="reference")
    rows = int(truth.offsets[-1])

    def judge(found: Plan) -> None:
        """Raises WrongResult unless every expert has its slots, in their order."""
        counts, slots = found
        if not (torch.equal(counts.int(), truth.counts) and torch.equal(slots[:rows].int(), truth.slots[:rows])):
            raise WrongResult("rows are not those of the definition")

    def ours() -> Plan:
        plan = moe_plan(ids, case.real, tile=case.tile)
        return plan.counts, plan.slots

    def peer(sorts: Callable[[Tensor, spec.Case], Plan]) -> Call:
        return lambda: sorts(ids, case)

    return [
        Contender("ours", lambda: ours, judge),
        Contender("stable argsort, bincount", partial(peer, by_sort), judge),
        Contender("one-hot, cumsum", partial(peer, by_one_hot), judge),
    ]


def _case(case: spec.Case) -> Case:
    name = f"T{case.tokens} k{case.k} E{case.real} Z{case.zero} tile {case.tile}"
    return Case(name, spec.cost(case), partial(contenders, case))


CASES = (
    _case(spec.Case(128, 2, 4, zero=2, tile=16)),
    _case(spec.Case(16, 8, 64, tile=16)),
    *(_case(case) for case in spec.MODEL),
)
