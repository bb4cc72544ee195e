"""PreparedCodebook: writes that no version counts, and codewords that are not plain memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longcat_kernels import PreparedCodebook, ema_update, rvq_encode


def test_writes_that_torch_does_not_count_are_noticed_once_told() -> None:
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    book = PreparedCodebook(words)
    want = rvq_encode(x, [book]).codes
    words.numpy()[:] = words.flip(0).numpy().copy()
    book.mark_stale()
    assert torch.equal(rvq_encode(x, [book]).codes, 39 - want)


@pytest.mark.parametrize("gram", [False, True])
def test_a_prepared_codebook_follows_an_update_through_data(gram: bool) -> None:
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    book = PreparedCodebook(words, gram=gram).refresh()
    ema_update(words.data, words.clone(), torch.ones(40), x, torch.zeros(60, dtype=torch.int64), prepared=book)
    assert torch.equal(rvq_encode(x, book, levels=2).codes, rvq_encode(x, words, levels=2).codes)


def test_a_prepared_codebook_of_inference_mode_is_packed_for_every_use() -> None:
    with torch.inference_mode():
        x, words = torch.randn(60, 8), torch.randn(40, 8)
        book = PreparedCodebook(words)
        for _ in range(2):
            assert torch.equal(rvq_encode(x, [book]).codes, rvq_encode(x, [words]).codes)
            words.copy_(torch.randn(40, 8))


def test_a_prepared_codebook_reads_lazily_negated_words() -> None:
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    negated = torch.complex(torch.zeros(40, 8), words).conj().imag
    book = PreparedCodebook(negated)
    assert negated.is_neg() and torch.equal(rvq_encode(x, [book]).codes, rvq_encode(x, [-words]).codes)


def test_a_prepared_codebook_without_memory_stands_for_its_words() -> None:
    with FakeTensorMode():
        assert rvq_encode(torch.randn(3, 8), [PreparedCodebook(torch.randn(5, 8))]).codes.shape == (3, 1)
