"""The profile-guided scheduler: a schedule for measured costs, under a limit of memory on each device.

It starts from the closed forms, so that it is never worse than those that fit, and goes on in three steps: blocks that
last shorter under these costs (pattern.py), random walks from several starts (walk.py), and a long walk from the best.
Deterministic: costs, limits, effort and seed give the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule, v_placement
from longcat_model.pipeline.schedules import pattern
from longcat_model.pipeline.schedules.v import half_block, min_block, v_half, v_min, v_zb, zb_block
from longcat_model.pipeline.schedules.walk import Instance, Orders, decode, encode, instance, makespan, walk
from longcat_model.pipeline.simulate import peak_bytes, simulate


@dataclass(frozen=True)
class Effort:
    """How much is tried. The default takes some 15 seconds for 8 devices and 64 microbatches, less for fewer."""

    moves: int = 5_000_000  # of all walks together
    tries: int = 3000  # changes of a block, or of rules, from each start
    blocks: int = 6  # starts of the search for a block, or for rules
    starts: int = 24  # walks at first, at most
    reach: int = 4  # places that a move goes at most
    seed: int = 0


DEFAULT = Effort()


def searched(
    costs: Costs,
    limits: Sequence[int] | None = None,
    effort: Effort = DEFAULT,
) -> Schedule:
    """A V schedule for two stages a device (v_placement), short under `costs`.

    `limits` are the bytes that each device may hold for the backward; where None, as many as V-Half holds on the device
    where it holds most. Within each stage microbatches run in order.

    Raises:
        ValueError: the number of stages is odd, or a limit is too small for one microbatch at a time.
    """
    if costs.stages % 2:
        raise ValueError(f"schedule: a V schedule must have an even number of stages, got {costs.stages}")
    devices, microbatches = costs.stages // 2, costs.microbatches
    placement = v_placement(devices)
    if limits is None:
        limits = [max(peak_bytes(v_half(devices, microbatches), costs))] * devices
    problem = instance(placement, costs, limits)
    closed = [encode(make(devices, microbatches)) for make in (v_half, v_min, v_zb)]
    found = [*closed, *_blocks(problem, effort), encode(one_at_a_time(placement, microbatches))]
    starts = _best(problem, found, len(found))
    if not starts:
        least = peak_bytes(one_at_a_time(placement, microbatches), costs)
        raise ValueError(f"schedule: memory of the devices must be at least {list(least)} bytes, got {list(limits)}")
    results = [*starts, *_walks(problem, starts, effort)]
    schedules = [decode(orders, placement) for orders in _best(problem, results, 3)]
    return min(schedules, key=lambda schedule: simulate(schedule, placement, costs).makespan)


def one_at_a_time(placement: Placement, microbatches: int) -> Schedule:
    """Each microbatch forward and backward through all stages before the next: the least memory that there can be."""
    stages = len(placement)

    def row(device: int) -> tuple[Action, ...]:
        own = [stage for stage in range(stages) if placement[stage] == device]
        kinds = [(stage, Kind.F) for stage in own]
        kinds += [(stage, kind) for stage in reversed(own) for kind in (Kind.I, Kind.W)]
        return tuple(Action(stage, kind, microbatch) for microbatch in range(microbatches) for stage, kind in kinds)

    return tuple(map(row, range(max(placement) + 1)))


def _best(problem: Instance, candidates: Sequence[Orders], count: int) -> list[Orders]:
    """The shortest `count` of those that run within the limits, the shortest first."""
    lengths = [makespan(problem, orders) for orders in candidates]
    timed = [(length, place) for place, length in enumerate(lengths) if length is not None]
    return [candidates[place] for _, place in sorted(timed)[:count]]


def _blocks(problem: Instance, effort: Effort) -> list[Orders]:
    """Several searches from the block that lasts shortest of those that fit, each repeated for all microbatches."""
    devices, microbatches = len(problem.limits), problem.microbatches
    blocks = [make(devices) for make in (half_block, min_block, zb_block)]
    lengths = [makespan(problem, pattern.repeated(block, microbatches)) for block in blocks]
    fit = [(length, place) for place, length in enumerate(lengths) if length is not None]
    if not fit:
        return []
    start = blocks[min(fit)[1]]
    found = (pattern.search(problem, start, effort.tries, effort.seed + number) for number in range(effort.blocks))
    return [pattern.repeated(block, microbatches) for block in found]


def _walks(problem: Instance, starts: Sequence[Orders], effort: Effort) -> list[Orders]:
    """Walks in three rounds, each from the best of the round before, each with a third of the moves."""
    actions = len(starts[0])
    many = max(4, min(effort.starts, effort.moves // (300 * actions)))
    found = list(starts)
    for number, count in enumerate((many, max(2, many // 4), 1)):
        moves = effort.moves // 3 // count
        found = [
            walk(problem, found[i % len(found)], moves, effort.reach, effort.seed + 1000 * number + i)[0]
            for i in range(count)
        ]
        found = _best(problem, found, len(found))
    return found
