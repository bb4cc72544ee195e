"""The gradient of rvq_encode: the kernel and the composition in torch give the same bits, and both are the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_kernels import native
from longcat_kernels.modules import ResidualVQ
from longcat_kernels.ops._rvq_encode_backward import rvq_encode_backward

needs_native = pytest.mark.skipif(
    native.why_not() is not None, reason="rvq_encode_backward, cpu: the compiled module is missing"
)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def problem(
    rows: int, width: int, entries: list[int], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Both gradients, x, codes (a fifth of the rows masked) and codebooks."""
    torch.manual_seed(seed)
    codes = torch.stack([torch.randint(k, (rows,)) for k in entries], 1)
    codes[torch.rand(rows) < 0.2] = -1
    books = [torch.randn(k, width + 2)[:, :width] for k in entries]
    return (
        torch.randn(rows, width).to(dtype),
        torch.randn(len(entries)),
        torch.randn(rows, width).to(dtype),
        codes,
        books,
    )


@needs_native
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 30),
    width=st.integers(1, 40),
    entries=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=FLOATS,
    residual_dtype=FLOATS,
    which=st.sampled_from(["both", "quantized", "losses", "neither"]),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_implementations_agree_to_the_bit(
    rows: int, width: int, entries: list[int], dtype: Any, residual_dtype: Any, which: str, strided: bool, seed: int
) -> None:
    grad, grad_losses, x, codes, books = problem(rows, width, entries, dtype, seed)
    if rows:
        x[0, 0] = torch.inf
    if strided:
        grad, x, codes = grad[:1].expand(rows, width), x.T.contiguous().T, codes.T.contiguous().T
    given_grad = grad if which in ("both", "quantized") else None
    given_losses = grad_losses if which in ("both", "losses") else None
    got, want = (
        rvq_encode_backward(given_grad, given_losses, x, codes, books, residual_dtype, backend)
        for backend in ("cpu", "reference")
    )
    assert got.dtype == dtype and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_the_formula(backend: str) -> None:
    grad, grad_losses, x, codes, books = problem(20, 6, [4, 5, 3], torch.float32, 0)
    got = rvq_encode_backward(grad, grad_losses, x, codes, books, torch.float32, backend)
    counted = codes[:, 0] >= 0
    chosen = torch.stack([book.double()[code] for book, code in zip(books, codes.T, strict=True)])
    left = x.double() - chosen.cumsum(0)
    want = grad.double() + (2 * grad_losses.double()[:, None, None] * left).sum(0) / (counted.sum() * 6)
    torch.testing.assert_close(got.double(), want * counted[:, None], rtol=1e-6, atol=1e-6)


@needs_native
def test_the_kernel_trusts_no_code_and_no_shape() -> None:
    module, x, books = native.module(), torch.ones(2, 3), [torch.ones(4, 3)] * 2
    out = torch.full((2, 3), 7.0)
    scales = torch.ones(2)
    for codes in ([[0, 0], [1, 4]], [[0, 0], [1, -1]]):
        with pytest.raises(ValueError, match="codes must name entries, or be negative from the first level on"):
            module.rvq_encode_backward(None, scales, x, torch.tensor(codes), books, torch.float32, out, threads=1)
    codes = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="grad must have the shape of x"):
        module.rvq_encode_backward(torch.ones(2, 2), scales, x, codes, books, torch.float32, out, threads=1)
    with pytest.raises(ValueError, match="codebooks must be as wide as x"):
        module.rvq_encode_backward(None, scales, x, codes, [torch.ones(4, 2)] * 2, torch.float32, out, threads=1)
    assert torch.equal(out, torch.full((2, 3), 7.0))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 30),
    width=st.integers(1, 9),
    entries=st.integers(1, 40),
    levels=st.integers(1, 3),
    shared=st.booleans(),
    masked=st.booleans(),
    dtype=FLOATS,
    seed=st.integers(0, 9),
)
def test_training_has_the_gradient_of_the_codewords_it_chose(
    rows: int, width: int, entries: int, levels: int, shared: bool, masked: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    module = ResidualVQ([entries] * levels, width, shared=shared, decay=0.5, kmeans_init=False)
    x, mask = torch.randn(rows, width, dtype=dtype), torch.rand(rows) < 0.7 if masked else None
    results = []
    for training in (False, True):
        leaf = x.clone().requires_grad_()
        encoding = module.train(training)(leaf, mask)
        (encoding.quantized * torch.linspace(-1, 1, width, dtype=dtype)).sum().add(encoding.losses.sum()).backward()
        results.append((encoding, leaf.grad))
    for got, want in zip((*results[1][0], results[1][1]), (*results[0][0], results[0][1]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "entries"), [(10, 500), (500, 10)])
def test_training_keeps_the_smaller_of_chosen_codewords_and_codebooks(rows: int, entries: int, shared: bool) -> None:
    module = ResidualVQ([entries] * 3, 8, shared=shared, kmeans_init=False)
    x = torch.randn(rows, 8, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    words = min(3 * rows, entries) if shared else 3 * min(rows, entries)
    assert sum(kept.values()) == rows * 8 + rows * 3 + words * 8  # x, codes, codewords
