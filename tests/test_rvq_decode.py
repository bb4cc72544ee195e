"""rvq_decode: the round trip, partial decoding, ignored codes, gradients."""

from __future__ import annotations

import pytest
import torch

from longcat_kernels import rvq_decode, rvq_encode


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
