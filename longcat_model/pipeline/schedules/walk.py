"""A search among the orders of a schedule that never makes it longer: one random move after the other.

A move takes one action to another place of its device's row and stays unless the schedule gets longer by it. Moves that
change nothing stay too: the walk drifts over schedules of equal length until it finds the edge of a shorter one. (Of
annealing, late acceptance and several second objectives, none was better for the same number of moves.)

The definition is the Python here; where the compiled module is there, its `schedule_walk` gives the same schedules some
hundred times faster. Times are integers, so that both agree to the bit.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from longcat_model.pipeline.costs import Costs, Table
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule
from longcat_model.pipeline.simulate import Deadlock, live_bytes, simulate

Orders = NDArray[np.int32]  # rows of all devices one after another: 3 * stage + kind; the k-th of them is microbatch k

KINDS = (Kind.F, Kind.I, Kind.W)
TICKS = 2**40  # about how many make all the work there is


@dataclass(frozen=True)
class Instance:
    """What is searched: F, I and W of every stage and microbatch, microbatches in order on every stage."""

    placement: Placement
    costs: Costs  # times are integers
    limits: tuple[int, ...]  # [device] bytes that it may hold for the backward

    @functools.cached_property
    def arguments(self) -> tuple[object, ...]:
        """As the compiled module takes them."""
        tables = (self.costs.forward, self.costs.input, self.costs.weight)
        return (
            np.array(self.placement, np.int32),
            np.ascontiguousarray(np.array(tables, np.int64).transpose(1, 0, 2)),
            np.array(self.costs.transfer, np.int64),
            np.array(self.costs.saved, np.int64),
            list(self.limits),
        )


def instance(placement: Placement, costs: Costs, limits: tuple[int, ...]) -> Instance:
    """An instance whose times are in ticks, a power of two of the unit of `costs`: whole numbers stay exact."""
    total = sum(map(costs.stage_work, range(costs.stages))) + sum(map(sum, costs.transfer))
    scale = 2.0 ** math.floor(math.log2(TICKS / total)) if total else 1.0

    def ticks(table: Table) -> Table:
        return tuple(tuple(round(value * scale) for value in row) for row in table)

    times = (ticks(table) for table in (costs.forward, costs.input, costs.weight, costs.transfer))
    return Instance(placement, Costs(*times, costs.saved, costs.received), limits)


def encode(schedule: Schedule) -> Orders:
    """A schedule of F, I and W, whose stages take microbatches in order, as numbers."""
    return np.array([3 * a.stage + KINDS.index(a.kind) for row in schedule for a in row], np.int32)


def decode(orders: Orders, placement: Placement) -> Schedule:
    """Inverse of `encode`."""
    length = len(orders) // len(placement)
    count = [0] * (3 * len(placement))
    numbers = iter(orders.tolist())

    def row(device: int) -> Iterator[Action]:
        for _ in range(length * placement.count(device)):
            task = next(numbers)
            yield Action(task // 3, KINDS[task % 3], count[task])
            count[task] += 1

    return tuple(tuple(row(device)) for device in range(max(placement) + 1))


def makespan(problem: Instance, orders: Orders) -> int | None:
    """When the last action ends, in ticks; None where the limits are exceeded or devices wait for ever."""
    native = _native()
    if native is None:
        return _makespan(problem, decode(orders, problem.placement))
    found: int = native.schedule_makespan(orders, *problem.arguments)
    return None if found < 0 else found


def walk(problem: Instance, orders: Orders, moves: int, reach: int, seed: int) -> tuple[Orders, int]:
    """Makes `moves` moves of at most `reach` places; gives the orders that it ends with and their makespan in ticks.

    `orders` must have a makespan.
    """
    native = _native()
    if native is None:
        return walk_in_python(problem, orders, moves, reach, seed)
    found: tuple[Orders, int] = native.schedule_walk(orders, *problem.arguments, moves, reach, seed)
    return found


def walk_in_python(problem: Instance, orders: Orders, moves: int, reach: int, seed: int) -> tuple[Orders, int]:
    """`walk` as it is defined."""
    rows = [list(row) for row in decode(orders, problem.placement)]
    best = _makespan(problem, tuple(map(tuple, rows)))
    if best is None:
        raise ValueError("schedule: orders to start from must run to their end within the limits")
    random = _Random(seed)
    for _ in range(moves):
        row = rows[random.below(len(rows))]
        start, distance = random.below(len(row)), 1 + random.below(reach)
        end = start + distance if random.next() >> 63 else start - distance
        if not 0 <= end < len(row) or not _may_pass(row, start, end, problem.costs.stages):
            continue
        row.insert(end, row.pop(start))
        length = _makespan(problem, tuple(map(tuple, rows)))
        if length is None or length > best:
            row.insert(start, row.pop(end))
        else:
            best = length
    return encode(tuple(map(tuple, rows))), best


def _makespan(problem: Instance, schedule: Schedule) -> int | None:
    live = live_bytes(schedule, problem.costs)
    if any(max(row, default=0) > limit for row, limit in zip(live, problem.limits, strict=True)):
        return None
    try:
        return round(simulate(schedule, problem.placement, problem.costs).makespan)
    except Deadlock:
        return None


def _may_pass(row: list[Action], start: int, end: int, stages: int) -> bool:
    """Whether an action may pass those up to place `end`: microbatches of a stage stay in order, and so do I after F."""
    moved = row[start]
    passed = row[start + 1 : end + 1] if start < end else row[end:start]
    if any(other[:2] == moved[:2] for other in passed):
        return False
    same = (other for other in passed if other.microbatch == moved.microbatch)
    return not any(_before(moved, o, stages) if start < end else _before(o, moved, stages) for o in same)


def _before(first: Action, second: Action, stages: int) -> bool:
    """Whether, for one microbatch, an action must end before another begins: F up the stages, I down, W after its I."""
    if first.kind is Kind.W:
        return False
    rank = [a.stage if a.kind is Kind.F else 2 * stages - 1 - a.stage for a in (first, second)]
    return rank[0] < rank[1] + (second.kind is Kind.W)


class _Random:
    """SplitMix64 (Steele, Lea and Flood 2014): short enough to be written twice."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        mixed = self.state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
        return mixed ^ (mixed >> 31)

    def below(self, limit: int) -> int:
        return ((self.next() >> 32) * limit) >> 32


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module("longcat_kernels._C")
    except ImportError as error:
        warnings.warn(f"schedule: without longcat_kernels._C ({error}) a search takes hours, not seconds", stacklevel=2)
        return None
