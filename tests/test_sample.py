"""Sampling: Philox's published vectors, the drawn distribution, transformers' truncation, and independence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from longcat_kernels import sample
from longcat_kernels.reference.sampling import gumbel, philox

KNOWN = (  # key, counter, words: the known-answer tests of Random123
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_philox_gives_the_published_words(key: str, counter: str, expected: str) -> None:
    words = philox(*(tuple(torch.tensor(int(word, 16)) for word in text.split()) for text in (key, counter)))
    assert [f"{int(word):08x}" for word in words] == expected.split()


IDS = (torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))  # a history of two rows


def logits_of(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 2


def assert_drawn_from(ids: torch.Tensor, p: torch.Tensor) -> None:
    """Counts of ids fit probabilities p, which are exactly zero where nothing may be drawn."""
    counts = torch.bincount(ids, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    expected = p[kept].double() / p[kept].double().sum() * len(ids)
    assert chisquare(counts[kept], expected).pvalue > 1e-4


TRUNCATIONS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (7, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.9, 0.1)]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), TRUNCATIONS)
def test_sequential_draws_follow_the_truncated_softmax_of_transformers(top_k: int, top_p: float, min_p: float) -> None:
    logits, draws, past = logits_of(1, 24), 20_000, torch.tensor([[3, 0, 17, 3]])
    warped = RepetitionPenaltyLogitsProcessor(1.3)(past, logits.clone()) / 1.5
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    warped = MinPLogitsWarper(min_p)(None, warped) if min_p else warped
    history = (past[0].repeat(draws), torch.arange(draws + 1) * 4)
    options = {"temperature": 1.5, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": 1.3}
    drawn = sample(logits.expand(draws, -1), **options, history=history, seed=11)
    assert_drawn_from(drawn.ids, warped.softmax(1)[0])
    torch.testing.assert_close(drawn.drawn_logprobs, warped.log_softmax(1)[0, drawn.ids])


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), TRUNCATIONS)
def test_joint_draws_follow_the_released_server(top_k: int, top_p: float, min_p: float) -> None:
    """Both limits on one sorted softmax, which is not renormalised between them."""
    logits, draws = logits_of(1, 24), 20_000
    p = (logits[0].double() / 1.5).softmax(0)
    ordered, order = p.sort(descending=True)
    dropped = (torch.arange(24) >= (top_k or 24)) | (ordered.cumsum(0) - ordered > top_p)
    kept = p.index_fill(0, order[dropped], 0.0)
    kept[kept < min_p * p.max()] = 0
    options = {"temperature": 1.5, "top_k": top_k, "top_p": top_p, "min_p": min_p, "order": "joint"}
    drawn = sample(logits.expand(draws, -1), **options, seed=12)
    assert_drawn_from(drawn.ids, kept)
    torch.testing.assert_close(drawn.drawn_logprobs, (kept / kept.sum()).log()[drawn.ids].float())


def test_orders_differ_where_top_k_cuts_mass_off() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(2000, -1)
    options = {"top_k": 3, "top_p": 0.75}
    assert set(sample(logits, **options, order="sequential").ids.tolist()) == {0, 1}  # 0.4 / 0.9 + 0.3 / 0.9 > 0.75
    assert set(sample(logits, **options, order="joint").ids.tolist()) == {0, 1, 2}  # 0.4 + 0.3 < 0.75
    is_joint = torch.arange(len(logits)) % 2 == 1
    mixed = sample(logits, **options, order=is_joint).ids
    for i, order in enumerate(("sequential", "joint")):
        assert torch.equal(mixed[i::2], sample(logits, **options, order=order).ids[i::2])


@pytest.mark.parametrize("vary", ["seed", "step", "level"])
def test_seeds_steps_and_levels_draw_independently(vary: str) -> None:
    logits = torch.zeros(1, 4)
    pairs = torch.zeros(4, 4)
    for i in range(600):
        first, second = (int(sample(logits, **{vary: 2 * i + j}).ids) for j in range(2))
        pairs[first, second] += 1
    assert chisquare(pairs.flatten()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    classes=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(-(2**40), 2**40),
    step=st.integers(0, 2**40),
)
def test_a_row_draws_the_same_whatever_its_batch(
    rows: int, classes: int, temperature: float, top_k: int, top_p: float, seed: int, step: int
) -> None:
    logits = logits_of(rows, classes, seed=rows)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "step": step}
    ids, logprobs, drawn_logprobs = sample(logits, seed=seed, **options)
    assert (drawn_logprobs >= logprobs - 1e-5).all() or temperature not in (0.0, 1.0)
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
    for row in range(rows):
        alone = sample(logits[row : row + 1], seed=torch.tensor([seed + row]), **options)
        assert alone.ids == ids[row]
    ranks = (logits > logits.gather(1, ids[:, None])).sum(1)
    assert (ranks < min(top_k or classes, classes)).all()


def test_temperature_zero_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert sample(logits, temperature=0.0).ids.tolist() == [1, 0]


def test_top_k_keeps_the_lowest_of_equal_ids() -> None:
    ids = sample(torch.zeros(500, 8), top_k=3).ids
    assert set(ids.tolist()) == {0, 1, 2}


def test_a_tiny_top_p_is_greedy() -> None:
    logits = logits_of(50, 20)
    assert torch.equal(sample(logits, top_p=1e-6).ids, logits.argmax(1))


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.zeros(300, 6).index_fill(1, torch.tensor([0, 2, 5]), -torch.inf)
    for options in ({}, {"top_k": 5}, {"top_p": 0.999}, {"temperature": 0.0}):
        assert set(sample(logits, **options).ids.tolist()) <= {1, 3, 4}


def test_noise_is_standard_gumbel() -> None:
    (noise,) = gumbel(torch.arange(200), torch.zeros(200).long(), [(0, 500)])
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(1.6449, abs=0.03)


def test_numbers_seeds_and_steps_may_be_of_each_row() -> None:
    logits, seeds = logits_of(6, 20), torch.tensor([5, -1, 2**40, 0, 3, 3])
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 1.0]),
        "top_k": torch.tensor([0, 3, 0, 5, 2, 0]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1.0, 1.0, 0.7]),
        "step": torch.tensor([0, 1, 2**62, 5, 9, 9]),
    }
    together = sample(logits, seed=seeds, **options)
    for row in range(6):
        alone = {name: value[row].item() for name, value in options.items()}
        for a, b in zip(sample(logits[row : row + 1], seed=seeds[row : row + 1], **alone), together, strict=True):
            assert torch.equal(a[0], b[row])


@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_says_so_and_others_do_not_notice(lost: float) -> None:
    logits = logits_of(3, 9)
    clean = sample(logits, top_k=4)
    logits[1, 5] = lost
    dirty = sample(logits, top_k=4)
    assert dirty.ids[1] == 0 and dirty.logprobs[1].isnan() and dirty.drawn_logprobs[1].isnan()
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be >= 0 and finite, got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite, got nan"),
        ({"top_k": -1}, r"top_k must be >= 0 \(0 keeps all\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"seed": 2**63}, r"seed must be an int in \[-2\^63, 2\^63 - 2\] or a tensor, got 9223372036854775808"),
        ({"seed": 1.5}, r"seed must be an int in \[-2\^63, 2\^63 - 2\] or a tensor, got 1\.5"),
        ({"seed": torch.zeros(2, device="meta").long()}, "seed must be on cpu, got meta"),
        ({"step": -1}, r"step must be an int in \[0, 2\^63\) or a tensor, got -1"),
        ({"step": 2**63}, r"step must be an int in \[0, 2\^63\) or a tensor, got 9223372036854775808"),
        ({"step": torch.zeros(2)}, r"step must be an int or int64 \[2\], got torch\.float32 \[2\]"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1"),
        ({"top_p": torch.tensor([0.5, -0.5])}, r"top_p must be in \(0, 1\], got -0\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be > 0 and finite, got 0"),
        ({"order": "first"}, r"order must be sequential, joint or a bool tensor, got 'first'"),
        ({"history": (IDS[0], IDS[0])}, r"history offsets must be int64 \[3\], got torch\.int64 \[1\]"),
        ({"history": (IDS[0].int(), IDS[1])}, r"history ids must be int64 \[N\], got torch\.int32 \[1\]"),
        ({"history": (IDS[0], torch.tensor([0, 2, 2]))}, r"history offsets must rise .* at most 1, got \[0, 2, 2\]"),
        ({"level": 2**32}, r"level must be in \[0, 2\^32\), got 4294967296"),
        ({"seed": torch.zeros(3)}, r"seed must be an int or int64 \[2\], got torch\.float32 \[3\]"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample: {message}"):
        sample(torch.zeros(2, 4), **options)


def test_refuses_logits_that_are_no_floats() -> None:
    with pytest.raises(ValueError, match=r"sample: logits must be floating point, got torch\.int64"):
        sample(torch.zeros(2, 4, dtype=torch.int64))


def test_refuses_logits_without_classes() -> None:
    with pytest.raises(ValueError, match=r"sample: logits must be \[T, V\] with V >= 1, got \[2, 0\]"):
        sample(torch.zeros(2, 0))
