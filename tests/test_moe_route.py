"""Routing: the choice, the tie rule, the weights, the gradient, and what the bias may and may not touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import moe_route

SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 9)).flatmap(
    lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[1]))
)


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES,
    score=st.sampled_from(["softmax", "sigmoid"]),
    renorm=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_equals_sorting_row_by_row(
    shape: tuple[int, int, int], score: str, renorm: bool, biased: bool, dtype: torch.dtype, seed: int, backend: str
) -> None:
    tokens, experts, k = shape
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(experts, tokens, generator=g).mul(2).round().to(dtype).T  # ties, and not contiguous
    bias = torch.randn(experts, generator=g).round() / 4 if biased else None
    weights, ids = moe_route(
        logits, k, n_real=experts, bias=bias, score=score, renorm=renorm, scale=2.5, backend=backend
    )
    p = logits.float().softmax(1) if score == "softmax" else logits.float().sigmoid()
    key = p if bias is None else p + bias
    for t in range(tokens):
        want = sorted(range(experts), key=lambda e: (-key[t, e].item(), e))[:k]
        assert ids[t].tolist() == want
        chosen = p[t, want]
        torch.testing.assert_close(weights[t], 2.5 * (chosen / chosen.sum() if renorm else chosen))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ties_go_to_the_lower_id(backend: str) -> None:
    ids = moe_route(torch.zeros(3, 384), 12, n_real=256, backend=backend)[1]
    assert ids.tolist() == [list(range(12))] * 3


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bias_moves_the_choice_but_no_weight_and_no_gradient(backend: str) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    bias = torch.tensor([-1.0, 0.0, 0.5], requires_grad=True)
    weights, ids = moe_route(logits, 1, n_real=3, bias=bias, backend=backend)
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights, logits.softmax(1)[:, 2:])
    grad_logits, grad_bias = torch.autograd.grad(weights.sum(), (logits, bias), allow_unused=True)
    assert grad_bias is None and grad_logits.abs().sum() > 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renorm", [False, True])
def test_gradient_is_exact(score: str, renorm: bool) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def weights(logits: torch.Tensor) -> torch.Tensor:
        return moe_route(logits, 3, n_real=4, score=score, renorm=renorm, scale=1.5)[0]

    assert torch.autograd.gradcheck(weights, (logits,))


def test_bfloat16_logits_are_routed_in_float32() -> None:
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, ids = moe_route(logits, 4, n_real=32)
    want, want_ids = moe_route(logits.float(), 4, n_real=32)
    assert torch.equal(weights, want) and torch.equal(ids, want_ids)


def test_a_row_of_nan_stays_in_its_row() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    clean = moe_route(logits, 2, n_real=5)[0]
    logits[1] = torch.nan
    weights = moe_route(logits, 2, n_real=5)[0]
    assert torch.equal(weights[[0, 2]], clean[[0, 2]]) and weights[1].isnan().all()


def test_the_kernel_chooses_as_the_definition_does_nan_and_infinity_included() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 40, generator=g).mul(3).round()
    logits[torch.rand(64, 40, generator=g) < 0.05] = torch.inf
    logits[torch.rand(64, 40, generator=g) < 0.05] = torch.nan
    for score in ("softmax", "sigmoid"):
        got, want = (
            moe_route(logits, 7, n_real=30, bias=torch.zeros(40), score=score, scale=6.0, backend=backend)
            for backend in ("auto", "reference")
        )
        assert torch.equal(got[1], want[1]) and torch.equal(got[0].nan_to_num(-1), want[0].nan_to_num(-1))
