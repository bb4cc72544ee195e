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
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule
from longcat_model.pipeline.simulate import Deadlock, live_bytes, simulate

Orders = NDArray[np.int32]  # rows of all devices one after another: (3 * stage + kind) * microbatches + microbatch

KINDS = (Kind.F, Kind.I, Kind.W)
TICKS = 2**40  # about how many make all the work there is


@dataclass(frozen=True, eq=False)
class Instance:
    """What is searched: an order of F, I and W of every stage and microbatch."""

    placement: Placement
    durations: NDArray[np.int64]  # [stages, 3, microbatches] of F, I and W, in ticks
    transfers: NDArray[np.int64]  # [stages, microbatches] from a stage to the one after, in ticks
    saved: NDArray[np.int64]  # [stages, microbatches] bytes
    limits: tuple[int, ...]  # [device] bytes that it may hold for the backward

    @property
    def microbatches(self) -> int:
        return self.saved.shape[1]

    @functools.cached_property
    def costs(self) -> Costs:
        """The same as plain data."""
        tables = (*(self.durations[:, kind] for kind in range(3)), self.transfers, self.saved, self.saved)
        return Costs(*(tuple(map(tuple, table.tolist())) for table in tables))

    @property
    def arguments(self) -> tuple[object, ...]:
        """The same as the compiled module takes it."""
        placement = np.array(self.placement, np.int32)
        return (placement, self.durations, self.transfers, self.saved, list(self.limits))

    def alike(self, microbatches: int) -> Instance:
        """So many microbatches of average durations and largest sizes."""

        def repeat(table: NDArray) -> NDArray[np.int64]:
            return np.repeat(np.rint(table).astype(np.int64)[..., None], microbatches, axis=-1)

        durations, transfers = repeat(self.durations.mean(axis=-1)), repeat(self.transfers.mean(axis=-1))
        return Instance(self.placement, durations, transfers, repeat(self.saved.max(axis=-1)), self.limits)


def instance(placement: Placement, costs: Costs, limits: Sequence[int]) -> Instance:
    """An instance whose times are in ticks, a power of two of the unit of `costs`: whole numbers stay exact."""
    times = np.array([costs.forward, costs.input, costs.weight, costs.transfer], np.float64)
    scale = 2.0 ** math.floor(math.log2(TICKS / total)) if (total := times.sum()) else 1.0
    ticks = np.rint(times * scale).astype(np.int64)
    durations = np.ascontiguousarray(ticks[:3].transpose(1, 0, 2))
    return Instance(placement, durations, ticks[3], np.array(costs.saved, np.int64), tuple(limits))


def encode(schedule: Schedule) -> Orders:
    """A schedule of F, I and W as numbers."""
    microbatches = 1 + max(action.microbatch for row in schedule for action in row)
    return np.array(
        [(3 * a.stage + KINDS.index(a.kind)) * microbatches + a.microbatch for row in schedule for a in row], np.int32
    )


def decode(orders: Orders, placement: Placement) -> Schedule:
    """Inverse of `encode`."""
    microbatches = len(orders) // (3 * len(placement))
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    for number in orders.tolist():
        task, microbatch = divmod(number, microbatches)
        rows[placement[task // 3]].append(Action(task // 3, KINDS[task % 3], microbatch))
    return tuple(map(tuple, rows))


def makespan(problem: Instance, orders: Orders) -> int | None:
    """When the last action ends, in ticks; None where the limits are exceeded or devices wait for ever."""
    native = compiled()
    if native is None:
        return _makespan(problem, decode(orders, problem.placement))
    found: int = native.schedule_makespan(orders, *problem.arguments)
    return None if found < 0 else found


def walk(
    problem: Instance, orders: Orders, moves: int, reach: int, seed: int, *, overtakes: bool = False
) -> tuple[Orders, int]:
    """Makes `moves` moves of at most `reach` places; gives the orders that it ends with and their makespan in ticks.

    `orders` must have a makespan. A microbatch may pass another at a stage only where it `overtakes`.
    """
    native = compiled()
    if native is None:
        return walk_in_python(problem, orders, moves, reach, seed, overtakes=overtakes)
    found: tuple[Orders, int] = native.schedule_walk(orders, *problem.arguments, moves, reach, overtakes, seed)
    return found


def walk_in_python(
    problem: Instance, orders: Orders, moves: int, reach: int, seed: int, *, overtakes: bool = False
) -> tuple[Orders, int]:
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
        if not 0 <= end < len(row) or not _may_pass(row, start, end, len(problem.placement), overtakes):
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


def _may_pass(row: list[Action], start: int, end: int, stages: int, overtakes: bool) -> bool:
    """Whether an action may pass those up to place `end`: none that data orders, none that it may not overtake."""
    moved = row[start]
    passed = row[start + 1 : end + 1] if start < end else row[end:start]
    if not overtakes and any(other[:2] == moved[:2] for other in passed):
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


def is_compiled() -> bool:
    """Whether walks are quick."""
    return compiled() is not None


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled module, or None."""
    try:
        return importlib.import_module("longcat_kernels._C")
    except ImportError as error:
        warnings.warn(f"schedule: without longcat_kernels._C ({error}) a search takes hours, not seconds", stacklevel=2)
        return None
