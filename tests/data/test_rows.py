"""Rows: every document once, none too long, of alike cost; shuffled orders are permutations."""

from __future__ import annotations

from pathlib import Path

import make
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model import presets
from longcat_model.data import rows
from longcat_model.data.rows import HeadCosts, Rows, in_even_parts, pack, plan
from longcat_model.data.shuffle import shuffled

DOCUMENTS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60)


@given(DOCUMENTS, st.integers(20, 50))
@settings(deadline=None)
def test_every_document_is_in_one_row_that_holds_it(documents: list[tuple[int, int]], row_length: int) -> None:
    lengths, costs = np.array(documents).T
    packed = pack(lengths, costs, row_length)
    assert sorted(number for row in packed for number in row) == list(range(len(documents)))
    assert all(0 < lengths[row].sum() <= row_length for row in packed)


def mixture(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and supervised positions of text, images read, painted images and speech, as long as real ones are."""
    draw = np.random.default_rng(seed)
    counts = np.zeros((count, 3), dtype=np.int64)
    for row, kind in zip(counts, draw.integers(4, size=count), strict=True):
        text, image, frames = int(draw.lognormal(5.5)) % 3000 + 10, draw.integers(100, 1400), draw.integers(30, 600)
        row[:] = [
            (text, 0, 0),
            (image + text // 2, 0, 0),
            (image + text // 4, image, 0),
            (frames + text // 4, 0, frames),
        ][kind]
    return counts[:, 0], counts[:, 1:] @ np.array(HeadCosts.of(presets.longcat_next()))


def first_fit(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    room: list[int] = []
    found: list[list[int]] = []
    for number, length in enumerate(lengths):
        row = next((r for r, left in enumerate(room) if length <= left), len(room))
        if row == len(room):
            room.append(row_length)
            found.append([])
        room[row] -= length
        found[row].append(number)
    return found


def dearest_over_mean(costs: np.ndarray, packed: list[list[int]], microbatch: int, even: bool) -> float:
    """Heads' cost of the dearest of 8 microbatches by the mean one's, averaged over steps of random rows."""
    of_row, draw, found = np.array([costs[row].sum() for row in packed]), np.random.default_rng(0), []
    for _ in range(100):
        step = draw.choice(of_row, 8 * microbatch, replace=False)
        parts = (step[in_even_parts(step)] if even else step).reshape(8, microbatch).sum(1)
        found.append(parts.max() / parts.mean())
    return float(np.mean(found))


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_microbatches_cost_the_heads_alike(microbatch: int) -> None:
    lengths, costs = mixture(2048, seed=0)
    packed, plain = pack(lengths, costs, 4096), first_fit(lengths, 4096)
    ours = dearest_over_mean(costs, packed, microbatch, even=True)
    assert ours < 1.05 and ours - 1 < 0.1 * (dearest_over_mean(costs, plain, microbatch, even=False) - 1)
    assert len(packed) <= len(plain)


def test_rows_without_head_costs_are_as_full_as_first_fit_makes_them() -> None:
    lengths, costs = mixture(1024, seed=1)
    assert len(pack(lengths, np.zeros_like(costs), 4096)) <= len(first_fit(lengths, 4096))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40))
@settings(deadline=None)
def test_even_parts_are_an_order(costs: list[int]) -> None:
    assert sorted(in_even_parts(costs)) == list(range(len(costs)))


@given(st.sampled_from([8, 16, 32]).flatmap(lambda n: st.lists(st.integers(0, 100), min_size=n, max_size=n)))
@settings(deadline=None)
def test_even_parts_differ_by_no_more_than_two_rows_do(costs: list[int]) -> None:
    ordered = np.array(costs)[in_even_parts(costs)]
    for parts in (2, 4, 8):
        assert np.ptp(ordered.reshape(parts, -1).sum(1)) <= max(costs) - min(costs)


@given(st.integers(1, 5000), st.integers(0, 2**62))
@settings(deadline=None)
def test_a_shuffled_order_is_a_permutation(count: int, seed: int) -> None:
    order = shuffled(np.arange(count), count, seed)
    assert np.array_equal(np.sort(order), np.arange(count))
    some = np.arange(0, count, 7)
    assert np.array_equal(shuffled(some, count, seed), order[some])


def test_a_shuffled_order_looks_random() -> None:
    """Of 10,000: neighbours are no neighbours, seeds differ, every first place is about as likely."""
    one, two = (shuffled(np.arange(10_000), 10_000, seed) for seed in (1, 2))
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.04 and abs(np.corrcoef(one, two)[0, 1]) < 0.04
    assert abs((np.diff(one) > 0).mean() - 0.5) < 0.02
    first = np.bincount([shuffled(np.array([0]), 10, seed)[0] for seed in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 28  # chi-square of 9 degrees: once in 1000


def test_a_plan_holds_every_document_over_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WINDOW", 16)
    documents = make.documents()
    shards = make.shards(tmp_path / "data", [documents * 7, documents * 3])
    costs = HeadCosts.of(presets.tiny())
    planned = plan(shards, 40, costs, 3, tmp_path)
    members = [planned[row].tolist() for row in range(len(planned))]
    assert sorted(number for row in members for number in row) == list(range(50))
    assert all(shards.counts[row, 0].sum() <= 40 for row in members)
    assert members != sorted(members)
    again = Rows(planned.directory)
    assert [again[row].tolist() for row in range(len(again))] == members
    for other in (plan(shards, 41, costs, 3, tmp_path), plan(shards, 40, costs, 4, tmp_path)):
        assert other.directory != planned.directory
    assert not list(tmp_path.rglob("*.partial"))


def test_head_costs_are_the_released_heads() -> None:
    """A position reads a depth head's parameters once, those of attention once a level."""
    costs = HeadCosts.of(presets.longcat_next())
    assert costs.visual == 4 * (8 * 4 * 2048**2 + 2 * 16 * 2048**2) + 2048 * (8 * 3072 + 8 * 16_385)
    assert 1 < costs.audio / costs.visual < 2
