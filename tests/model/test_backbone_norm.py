"""The norm's own gradient against torch's and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longcat_model.backbone.norm import RMSNorm


@pytest.fixture
def norm() -> RMSNorm:
    torch.manual_seed(0)
    norm = RMSNorm(5, eps=1e-2)
    nn.init.normal_(norm.weight)
    return norm


def test_gradient_equals_finite_differences(norm: RMSNorm) -> None:
    norm.double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, norm.weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(norm: RMSNorm, dtype: torch.dtype) -> None:
    norm.to(dtype)
    x = torch.randn(4, 7, 5).to(dtype)
    truth = nn.functional.rms_norm(x, (5,), norm.weight, 1e-2)
    torch.testing.assert_close(norm(x), truth)
    with torch.no_grad():
        without = norm(x)
    assert torch.equal(norm(x), without)


def test_zeros_stay_zeros_with_a_finite_gradient(norm: RMSNorm) -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and not norm(x).any()
