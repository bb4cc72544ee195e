"""Prepared codebooks and experts: the same bits after every write, copy and trace, and of what is no plain memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longcat_kernels import PreparedCodebook, PreparedExperts, ema_update, fused_moe, rvq_encode
from longcat_kernels.ops.rvq_encode import IMPLS
from longcat_kernels.reference import rvq_encode as spec

BACKENDS = tuple(name for name in IMPLS if name != "cuda")  # which tests/cuda runs on the CPU


def prepared(codebooks: Any, **options: bool) -> Any:
    if isinstance(codebooks, Tensor):
        return PreparedCodebook(codebooks, **options)
    return [PreparedCodebook(book) for book in codebooks]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", spec.EDGE, ids=str)
def test_prepared_codebooks_give_the_same_bits(backend: str, case: spec.Case) -> None:
    arguments = spec.inputs(case)
    got = rvq_encode(**{**arguments, "codebooks": prepared(arguments["codebooks"])}, backend=backend)
    for a, b in zip(got, rvq_encode(**arguments, backend=backend), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_prepared_codebook_follows_every_write() -> None:
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    book = PreparedCodebook(words)
    writes = (
        lambda: words.add_(torch.randn(40, 8)),
        lambda: words.view(-1)[:17].zero_(),
        lambda: words.copy_(torch.randn(40, 8) + 100),
        lambda: ema_update(words, words.clone(), torch.ones(40), x, torch.zeros(60, dtype=torch.int64)),
    )
    for write in writes:
        assert torch.equal(rvq_encode(x, [book]).codes, rvq_encode(x, [words]).codes) and book.is_current
        write()
        assert not book.is_current
    assert torch.equal(rvq_encode(x, [book]).codes, rvq_encode(x, [words]).codes)


def test_a_prepared_codebook_copies_and_pickles_as_its_words() -> None:
    book = PreparedCodebook(torch.randn(5, 3), gram=True).refresh()
    for other in (copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert torch.equal(other.words, book.words) and other.packed is None and not other.is_current
        assert other.refresh().gram is not None


def test_a_prepared_codebook_is_its_words_inside_a_compiled_function() -> None:
    x, words = torch.randn(20, 6), torch.randn(30, 6)
    book = PreparedCodebook(words)
    compiled = torch.compile(lambda x: rvq_encode(x, [book]).codes, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), rvq_encode(x, [words]).codes)
        words.copy_(torch.randn(30, 6))


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.ones(3, 3).double(), torch.ones(3, 3).int()])
def test_a_prepared_codebook_refuses_what_is_none(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"PreparedCodebook: words must be float32 \[K, D\], K and D at least 1, got"):
        PreparedCodebook(bad)


def test_writes_that_torch_does_not_count_are_noticed_once_told() -> None:
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    book = PreparedCodebook(words)
    want = rvq_encode(x, [book]).codes
    words.numpy()[:] = words.flip(0).numpy().copy()
    book.mark_stale()
    assert torch.equal(rvq_encode(x, [book]).codes, 39 - want)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("entries", [40, 73])
def test_a_prepared_codebook_follows_words_that_moved_to_other_memory(gram: bool, entries: int) -> None:
    """As `module.to` moves parameters, which no version counts."""
    x, words = torch.randn(60, 8), torch.randn(40, 8)
    book = PreparedCodebook(words, gram=gram).refresh()
    words.data = torch.randn(entries, 8)
    assert not book.is_current
    assert torch.equal(rvq_encode(x, book, levels=2).codes, rvq_encode(x, words.clone(), levels=2).codes)
    words.data = torch.randn(entries + 30, 8)
    codes = torch.zeros(60, dtype=torch.int64)
    ema_update(words, words.clone(), torch.ones(len(words)), x, codes, prepared=book)
    assert torch.equal(rvq_encode(x, book, levels=2).codes, rvq_encode(x, words.clone(), levels=2).codes)


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


def experts() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2 * 5, 8), torch.randn(3, 8, 5)


def same_bits(gate_up: Tensor, down: Tensor, prepared: PreparedExperts) -> bool:
    x, ids, weights = torch.randn(9, 8).to(down.dtype), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        got, want = (fused_moe(x, gate_up, down, ids, weights, prepared=p) for p in (prepared, None))
    return torch.equal(got, want)


def test_prepared_experts_of_inference_mode_are_packed_for_every_use() -> None:
    with torch.inference_mode():
        gate_up, down = experts()
        prepared = PreparedExperts(gate_up, down)
        for _ in range(2):
            assert same_bits(gate_up, down, prepared) and not prepared.is_current
            gate_up.mul_(2)


def test_prepared_experts_follow_a_change_of_dtype() -> None:
    module = torch.nn.ParameterList(experts())
    prepared = PreparedExperts(module[0], module[1])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float32):
        module.to(dtype)
        assert same_bits(module[0], module[1], prepared)


def test_prepared_experts_notice_writes_that_torch_does_not_count_once_told() -> None:
    gate_up, down = experts()
    prepared = PreparedExperts(gate_up, down).refresh()
    down.data.neg_()
    prepared.mark_stale()
    assert same_bits(gate_up, down, prepared)


def test_prepared_experts_read_lazily_negated_weights() -> None:
    gate_up, down = (torch._neg_view(weight) for weight in experts())
    assert same_bits(gate_up, down, PreparedExperts(gate_up, down))
