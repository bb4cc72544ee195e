"""Batches: a pure function of seed and step, each document once a pass, the same with workers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import make
import pytest
import torch
import works

from longcat_model import presets
from longcat_model.data.batches import Ahead, Batches
from longcat_model.data.rows import HeadCosts, plan
from longcat_model.data.workers import in_order
from longcat_model.sequence import Batch
from longcat_model.training.microbatches import cut

ROWS, LENGTH = 4, 40


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    documents = [make.LAYOUT.document(make.LAYOUT.text([4 + n] * (1 + n % 9), loss=True)) for n in range(120)]
    costs = HeadCosts.of(presets.tiny())
    shards = make.shards(tmp_path / "data", [documents[:50], documents[50:]])
    return Batches(shards, plan(shards, LENGTH, costs, 0, tmp_path), costs, ROWS, LENGTH, 0)


def same(one: Batch, two: Batch) -> bool:
    pairs = ((one.inputs, two.inputs), (one.targets, two.targets))
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def contents(batch: Batch) -> list[int]:
    """The document of each BOS: its second id."""
    flat = batch.inputs.text.flatten()
    return [int(flat[i + 1]) - 4 for i in (flat == 1).nonzero().flatten()]


def test_a_pass_has_every_document_once_and_the_next_another_order(batches: Batches) -> None:
    """Passes follow each other within a batch, too: their number of rows is no multiple of a batch's."""
    count = len(batches.rows)
    assert count % ROWS
    found = [contents(batches(step)) for step in range(count)]  # ROWS passes
    assert Counter(n for step in found for n in step) == Counter(dict.fromkeys(range(120), ROWS))
    passes = Batches(**{**vars(batches), "rows_a_step": count})
    assert sorted(contents(passes(0))) == list(range(120)) and contents(passes(0)) != contents(passes(1))
    assert all(batches(step).inputs.text.shape == (ROWS, LENGTH) for step in range(3))


def test_steps_and_seeds_alone_decide(batches: Batches) -> None:
    again = pickle.loads(pickle.dumps(batches))
    assert same(again(7), batches(7)) and not same(batches(7), batches(8))
    other = Batches(**{**vars(batches), "seed": 1})
    assert not same(other(7), batches(7))


def test_fewer_rows_than_a_batch_are_repeated(tmp_path: Path) -> None:
    shards = make.shards(tmp_path / "data", [make.documents()[:1]])
    costs = HeadCosts.of(presets.tiny())
    batch = Batches(shards, plan(shards, LENGTH, costs, 0, tmp_path), costs, ROWS, LENGTH, 0)(5)
    assert len(batch.inputs.text) == ROWS and all(torch.equal(row, batch.inputs.text[0]) for row in batch.inputs.text)


def test_microbatches_of_a_batch_cost_alike(tmp_path: Path) -> None:
    """Two painted images and six texts: cut in two and in four, no part has both images."""
    cells = torch.zeros(5, 6, 3, dtype=torch.int64)
    documents = [*[make.LAYOUT.generate_image(cells)] * 2, *[make.LAYOUT.text([9] * 36, loss=True)] * 6]
    shards = make.shards(tmp_path / "data", [documents])
    costs = HeadCosts.of(presets.tiny())
    batches = Batches(shards, plan(shards, 48, costs, 0, tmp_path), costs, 8, 48, 0)
    for step in range(5):
        for parts in (2, 4):
            painted = [int((part.targets.visual[..., 0] >= 0).any(1).sum()) for part in cut(batches(step), parts)]
            assert max(painted) == 1 and sum(painted) == 2


def test_workers_change_nothing(batches: Batches) -> None:
    torch.manual_seed(3)
    state, steps = torch.get_rng_state(), 7
    ahead = pickle.loads(pickle.dumps(Ahead(batches, steps, workers=1)))
    for step in (0, 0, 1, 2, 5, 6):  # looked at, begun, gone on elsewhere
        assert same(ahead(step), batches(step)), step
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_end_with_a_killed_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    script = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from works import Tells
from longcat_model.data.workers import in_order
if __name__ == "__main__":
    results = in_order(Tells(pathlib.Path({str(file)!r})), range(9), workers=1)
    next(results)
    sys.stdin.read()
"""
    (tmp_path / "main.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stdin=subprocess.PIPE) as process:
        until(lambda: file.exists() and bool(file.read_text()))
        worker = int(file.read_text())
        assert alive(worker)
        process.kill()
    until(lambda: not alive(worker))


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("pause_s", [0.0, 1.0])
def test_a_worker_that_is_killed_is_told(pause_s: float) -> None:
    """While the main process waits for it, or before that process has fetched what it had made."""
    with pytest.raises(ChildProcessError, match="a worker process failed: "):
        for _ in in_order(works.Dies(), range(4), workers=1):
            time.sleep(pause_s)
