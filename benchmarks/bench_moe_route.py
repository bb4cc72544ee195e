"""moe_route against torch's top-k, at a router's sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import Call, Case, Contender, WrongResult
from longcat_kernels import moe_route
from longcat_kernels.reference import moe_route as spec

TRUSTED_WRONG = 1e-3  # share of ids that another order of rounding may exchange
CLOSE = 1e-5  # relative, of weights


def top_k(logits: Tensor, bias: Tensor | None, case: spec.Case, *, is_sorted: bool) -> tuple[Tensor, Tensor]:
    """As released models route: softmax, choice by the biased score, weights without the bias."""
    scores = logits.float().softmax(1)
    choice = scores if bias is None else scores + bias
    ids = choice.topk(case.k, dim=1, sorted=is_sorted).indices
    return scores.gather(1, ids) * case.scale, ids


def contenders(case: spec.Case, device: str) -> list[Contender]:
    """Ours, torch's top-k with and without order, and the first compiled."""
    arguments: dict[str, Any] = spec.inputs(case, device)
    logits, bias = arguments["logits"].detach(), arguments["bias"]
    arguments["logits"] = logits
    truth_weights, truth_ids = moe_route(**arguments, backend="reference")

    def judge(found: tuple[Tensor, Tensor]) -> float:
        """The share of wrong ids, in any order; raises WrongResult where it is no matter of rounding."""
        weights, ids = found
        share = (ids.sort(1).values != truth_ids.sort(1).values).float().mean().item()
        error = ((weights.sum(1) - truth_weights.sum(1)).abs().max() / truth_weights.sum(1).abs().max()).item()
        if share > TRUSTED_WRONG or not error <= CLOSE + share:
            raise WrongResult(f"{share:.2%} of the ids are wrong, weights are off by {error:.1e}")
        return share

    def exact(found: tuple[Tensor, Tensor]) -> float:
        if not torch.equal(found[1], truth_ids):
            raise WrongResult("ids are not those of the definition, in its order")
        return judge(found)

    def torch_call(is_sorted: bool) -> Call:
        return lambda: top_k(logits, bias, case, is_sorted=is_sorted)

    def compiled() -> Call:
        call = torch.compile(partial(top_k, case=case, is_sorted=True))
        return lambda: call(logits, bias)

    return [
        Contender("ours", lambda: lambda: moe_route(**arguments), exact),
        Contender("softmax, topk", lambda: torch_call(True), judge),
        Contender("softmax, topk unsorted", lambda: torch_call(False), judge),
        Contender("torch.compile", compiled, judge, slow=True),
    ]


def _case(case: spec.Case) -> Case:
    short = str(case.dtype).removeprefix("torch.")
    name = f"T{case.tokens} E{case.real} Z{case.zero} k{case.k} {short}"
    return Case(name, spec.cost(case), partial(contenders, case))


CASES = (
    _case(spec.Case(128, 4, 2, 2, biased=True)),
    *(
        _case(spec.Case(tokens, 256, 128, 12, biased=True, scale=6.0, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (16, 4096)
    ),
)
