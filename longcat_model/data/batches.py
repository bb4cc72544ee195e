"""Training batches from shards, as a pure function of seed and step, prepared by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_model.data.rows import HeadCosts, Rows, in_even_parts
from longcat_model.data.shards import Shards
from longcat_model.data.shuffle import shuffled
from longcat_model.data.workers import in_order
from longcat_model.sequence import Batch, pack_rows


@dataclass(frozen=True)
class Batches:
    """A step's batch: `rows_a_step` packed rows of `row_length` positions.

    Each pass over the data has every document once, its rows shuffled anew.

    Rows stand in an order in which contiguous halves, quarters and so on of a batch cost the heads alike: microbatches
    are such parts.
    """

    shards: Shards
    rows: Rows
    costs: HeadCosts
    rows_a_step: int
    row_length: int
    seed: int

    def __call__(self, step: int) -> Batch:
        chosen = [self.rows[row] for row in self._rows(step)]
        heads = [float((self.shards.counts[numbers, 1:] @ np.array(self.costs)).sum()) for numbers in chosen]
        ordered = [chosen[i] for i in in_even_parts(heads)]
        return pack_rows([[self.shards[int(number)] for number in row] for row in ordered], self.row_length)

    def _rows(self, step: int) -> Iterator[int]:
        places = step * self.rows_a_step + np.arange(self.rows_a_step)
        for epoch in np.unique(places // len(self.rows)):
            here = places[places // len(self.rows) == epoch] - epoch * len(self.rows)
            yield from shuffled(here, len(self.rows), (self.seed << 32) + int(epoch)).tolist()


class Ahead:
    """`batch`, asked step after step, with worker processes that prepare the next ones; the same batches.

    A step that does not follow the one asked before is made here and now. It can be sent to other processes, without
    its workers.

    Args:
        steps: the last step is steps - 1.
        workers: 0: every batch is made when it is asked for.
    """

    def __init__(self, batch: Callable[[int], Batch], steps: int, workers: int) -> None:
        self.batch, self.steps, self.workers = batch, steps, workers
        self._next = 0
        self._ready: Iterator[Batch] | None = None

    def __reduce__(self) -> tuple[type[Ahead], tuple[Any, ...]]:
        return Ahead, (self.batch, self.steps, self.workers)

    def __call__(self, step: int) -> Batch:
        follows, self._next = step == self._next and step > 0, step + 1
        if not follows or not self.workers:
            self._ready = None
            return self.batch(step)
        if self._ready is None:
            self._ready = in_order(self.batch, range(step, self.steps), self.workers)
        return next(self._ready)
