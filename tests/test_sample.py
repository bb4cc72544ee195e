"""Sampling: Philox's published vectors, the drawn distribution, transformers' truncation, and independence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

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


def logits_of(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.7)])
def test_draws_follow_the_truncated_softmax_of_transformers(top_k: int, top_p: float) -> None:
    logits, temperature, draws = logits_of(1, 24), 1.5, 20_000
    warped = logits / temperature
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    expected = warped.softmax(1)[0].double() * draws
    ids = sample(logits.expand(draws, -1), temperature=temperature, top_k=top_k, top_p=top_p, seed=11).ids
    counts = torch.bincount(ids, minlength=24)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept] / expected.sum() * draws).pvalue > 1e-4


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
    ids, logprobs = sample(logits, seed=seed, **options)
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
    (noise,) = gumbel(torch.arange(200), 0, [(0, 500)])
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(1.6449, abs=0.03)


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
        ({"step": -1}, r"step must be in \[0, 2\^64\), got -1"),
        ({"step": 2**64}, r"step must be in \[0, 2\^64\), got 18446744073709551616"),
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
