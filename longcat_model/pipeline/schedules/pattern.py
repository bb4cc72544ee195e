"""A search among the blocks of V schedules (see v.py): which order, repeated, lasts shortest under given costs.

A block has few entries however many microbatches there are, so that this finds what a walk through whole schedules is
slow to find: one change in all repetitions at once.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np

from longcat_model.pipeline.ir import Kind
from longcat_model.pipeline.schedules.v import PERIOD, Block
from longcat_model.pipeline.schedules.walk import KINDS, Instance, Orders, makespan

SHORT, LONG = 2, 3  # microbatches for each device: blocks are judged by schedules of these lengths


def repeated(block: Block, microbatches: int) -> Orders:
    """The block, once for each microbatch, as numbers: `encode(repeat(block, microbatches))`."""

    def row(slots: dict[tuple[int, Kind], int]) -> Orders:
        tasks = np.array([3 * stage + KINDS.index(kind) for stage, kind in slots], np.int32)
        times = np.array(list(slots.values()))[:, None] + PERIOD * np.arange(microbatches)
        actions = tasks[:, None] * microbatches + np.arange(microbatches, dtype=np.int32)
        return actions.ravel()[np.argsort(times.ravel(), kind="stable")]

    return np.concatenate([row(slots) for slots in block])


def search(problem: Instance, start: Block, tries: int, seed: int) -> Block:
    """Changes the order of a block `tries` times, and keeps what does not last longer; exact in all but the costs.

    Microbatches count as alike, and more of them than 3 a device by what one more takes.
    """
    chance = random.Random(seed)
    judge = _Judge(problem)
    block, best = list(start), judge.length(start)
    for _ in range(tries):
        device = chance.randrange(len(block))
        before = block[device]
        block[device] = _changed(before, chance)
        if not _valid(block[device]):
            block[device] = before
            continue
        length = judge.length(tuple(block))
        if length is not None and (best is None or length <= best):
            best = length
        else:
            block[device] = before
    return tuple(block)


class _Judge:
    """How long a block lasts."""

    def __init__(self, problem: Instance) -> None:
        devices, self.microbatches = len(problem.limits), problem.microbatches
        self.lengths = [min(self.microbatches, count * devices) for count in (SHORT, LONG)]
        self.problems = [problem.alike(count) for count in self.lengths]

    def length(self, block: Block) -> float | None:
        """In ticks; None where it cannot be run within the limits."""
        (short, long), (few, many) = self.problems, self.lengths
        whole = makespan(long, repeated(block, many))
        if whole is None or few == many:
            return whole
        part = makespan(short, repeated(block, few))
        return None if part is None else whole + (self.microbatches - many) * (whole - part) / (many - few)


def _changed(slots: dict[tuple[int, Kind], int], chance: random.Random) -> dict[tuple[int, Kind], int]:
    """Takes an entry or a few, each some places earlier or later in the repetition; what it passes makes room."""
    slots = dict(slots)
    for _ in range(chance.choice((1, 1, 2, 3))):
        moved, step = chance.choice(list(slots)), chance.choice((1, -1))
        for _ in range(chance.choice((1, 1, 2, 3, PERIOD))):
            passed = next(name for name in slots if (slots[name] - slots[moved] - step) % PERIOD == 0)
            slots[moved] += step
            slots[passed] -= step
    return slots


def _valid(slots: dict[tuple[int, Kind], int]) -> bool:
    """Whether a microbatch goes up the stages forward and down again backward, and W follows I."""
    stages = sorted({stage for stage, _ in slots})
    chain = [(stage, Kind.F) for stage in stages] + [(stage, Kind.I) for stage in reversed(stages)]
    ordered = all(slots[first] < slots[second] for first, second in pairwise(chain))
    return ordered and all(slots[stage, Kind.I] < slots[stage, Kind.W] for stage in stages)
