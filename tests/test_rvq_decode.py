"""rvq_decode: the round trip, partial decoding, ignored codes, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import native, rvq_decode, rvq_encode


def test_decoding_an_encoding_gives_its_quantized_rows_to_the_bit() -> None:
    x, books = torch.randn(4, 9, 12), [torch.randn(k, 12) for k in (8, 20, 5)]
    got = rvq_encode(x, books)
    assert torch.equal(rvq_decode(got.codes, books), got.quantized)
    assert torch.equal(rvq_decode(got.codes, books, levels=2), rvq_encode(x, books, levels=2).quantized)


def test_a_shared_codebook_serves_every_level() -> None:
    book, codes = torch.randn(6, 4), torch.randint(6, (10, 3))
    torch.testing.assert_close(rvq_decode(codes, book), book[codes].sum(1))
    torch.testing.assert_close(rvq_decode(codes, book, levels=2), book[codes[:, :2]].sum(1))


def test_negative_codes_add_nothing_and_get_no_gradient() -> None:
    book = torch.randn(3, 4, requires_grad=True)
    out = rvq_decode(torch.tensor([[-1], [2], [2]]), [book])
    assert torch.equal(out[0], torch.zeros(4))
    out.sum().backward()
    assert torch.equal(book.grad, torch.tensor([[0.0], [0.0], [2.0]]).expand(3, 4))


def test_the_gradient_of_many_rows_is_the_same_bits_every_time() -> None:
    codes, weight = torch.randint(4, (5000, 2)), torch.randn(5000, 8)
    grads = []
    for _ in range(3):
        book = torch.zeros(4, 8, requires_grad=True)
        (rvq_decode(codes, [book, book]) * weight).sum().backward()
        grads.append(book.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("levels", [0, 4])
def test_refuses_a_level_count_the_codebooks_do_not_have(levels: int) -> None:
    with pytest.raises(ValueError, match=f"rvq_decode: levels must be between 1 and 3, got {levels}"):
        rvq_decode(torch.zeros(1, 4, dtype=torch.int64), [torch.ones(2, 2)] * 3, levels=levels)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 20),
    entries=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.skipif(native.why_not() is not None, reason="rvq_decode, cpu: the compiled module is missing")
def test_implementations_agree_to_the_bit(rows: int, width: int, entries: list[int], strided: bool, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.stack([torch.randint(-2, k, (rows,)) for k in entries], 1)
    books = [torch.randn(k, width + 3)[:, :width].mul(10.0 ** torch.randint(-3, 4, (k, 1))) for k in entries]
    weight = torch.randn(width, rows).T if strided else torch.randn(rows, width)
    if strided:
        codes = codes.T.contiguous().T
    results = []
    for backend in ("cpu", "reference"):
        leaves = [book.detach().requires_grad_() for book in books]
        out = rvq_decode(codes, leaves, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, weight)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_codebook_read_by_columns_is_left_to_the_reference() -> None:
    book, codes = torch.randn(4, 5).T, torch.tensor([[3], [-1]])
    assert torch.equal(rvq_decode(codes, book)[0], book[3])
    with pytest.raises(ValueError, match="cpu: needs codebooks whose rows have adjacent elements"):
        rvq_decode(codes, book, backend="cpu")


@pytest.mark.skipif(native.why_not() is not None, reason="rvq_decode, cpu: the compiled module is missing")
def test_the_kernel_trusts_no_code_and_no_shape() -> None:
    module, out = native.module(), torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="codes must be below 4 at level 0, got 4"):
        module.rvq_decode(torch.tensor([[0], [4]]), [torch.ones(4, 3)], out, threads=1)
    with pytest.raises(ValueError, match="codes must have one column a level"):
        module.rvq_decode(torch.tensor([[0], [1]]), [torch.ones(4, 3)] * 2, out, threads=1)
    with pytest.raises(ValueError, match="codebooks must be as wide as out"):
        module.rvq_decode(torch.tensor([[0], [1]]), [torch.ones(4, 2)], out, threads=1)
    with pytest.raises(ValueError, match="codes must be below"):
        module.rvq_decode_backward(out, torch.tensor([[0], [4]]), [torch.zeros(4, 3)], threads=1)
    assert torch.equal(out, torch.full((2, 3), 7.0))


@pytest.mark.skipif(native.why_not() is not None, reason="rvq_decode, cpu: the compiled module is missing")
@pytest.mark.parametrize("width", [1, 15, 64, 191, 260])
def test_every_instruction_set_has_the_definitions_bits(width: int) -> None:
    books = [torch.randn(k, width) for k in (9, 4, 6)]
    codes = torch.stack([torch.randint(-1, len(book), (50,)) for book in books], 1)
    codes[7] = -1
    truth = rvq_decode(codes, books, backend="reference")
    for isa in native.module().build_info()["isas_available"]:
        for threads in (1, 3):
            out = torch.full((50, width), torch.nan)
            native.module().rvq_decode(codes, books, out, threads=threads, isa=isa)
            assert torch.equal(out, truth), (isa, threads)
