"""Ops whose gradients have none of their own say so: a second derivative is refused, never taken for zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longcat_kernels.ops import OPS
from longcat_kernels.spec import Op

ONCE = {"fused_moe", "moe_route", "ngram_embedding", "rvq_decode", "rvq_encode"}


def leaves(values: Any) -> list[torch.Tensor]:
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in leaves(value)]
    return [values] if isinstance(values, torch.Tensor) and values.requires_grad else []


@pytest.mark.parametrize("op", [op for op in OPS if op.name in ONCE], ids=lambda op: op.name)
@pytest.mark.parametrize("squared", [False, True])
def test_is_refused(op: Op, squared: bool) -> None:
    arguments = op.spec.inputs(op.spec.EDGE[2], "cpu")
    results = leaves([op.run(**arguments)])
    total = sum((r.square().sum() if squared else r.sum()) for r in results)
    firsts = torch.autograd.grad(total, leaves(list(arguments.values())), create_graph=True, allow_unused=True)
    dense = [first.to_dense() for first in firsts if first is not None]
    if not squared and op.name == "rvq_decode":  # linear: its gradient depends on nothing
        assert not any(first.requires_grad for first in dense)
        return
    with pytest.raises(RuntimeError, match=f"^{op.name}: gradients must not be differentiated"):
        torch.autograd.grad(sum(first.square().sum() for first in dense), leaves(list(arguments.values())))
