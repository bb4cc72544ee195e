"""Microbatches of different lengths: in which order they go through the pipeline is free, and worth more than the rest.

Gradients are sums over microbatches, so the order changes them by rounding only. Short ones at both ends fill and drain
the pipeline quickly, long ones in the middle keep all devices busy; swaps of two do the rest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from longcat_model.pipeline.costs import Costs, permuted
from longcat_model.pipeline.ir import Schedule, v_placement
from longcat_model.pipeline.schedules.searched import DEFAULT, Effort, searched
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.schedules.walk import Instance, Orders, decode, encode, excess, instance, makespan, walk

FIRST_SWAPS, SWAPS, ROUNDS = 2000, 300, 8


def searched_in_any_order(
    costs: Costs,
    limits: Sequence[int],
    effort: Effort = DEFAULT,
) -> Schedule:
    """As `searched`, and microbatches need not run in the order of their numbers (but in the same on all stages).

    Raises ValueError as `searched` does.
    """
    placement = v_placement(costs.stages // 2)
    problem = instance(placement, costs, limits)
    closed = encode(v_half(costs.stages // 2, costs.microbatches))
    order = _swapped(problem, closed, short_at_both_ends(costs), FIRST_SWAPS, effort.seed)
    first = searched(permuted(costs, order), limits, replace(effort, moves=effort.moves // 2))
    orders = encode(first)
    for number in range(ROUNDS):
        order = _swapped(problem, orders, order, SWAPS, effort.seed + number)
        moves = effort.moves // (2 * ROUNDS)
        orders, _ = walk(problem.of(order), orders, moves, effort.reach, effort.seed + number)
    found = decode(orders, placement)
    return tuple(tuple(action._replace(microbatch=order[action.microbatch]) for action in row) for row in found)


def short_at_both_ends(costs: Costs) -> list[int]:
    """The order that begins with the shortest, ends with the next, and so on to the longest in the middle."""
    stages, tables = range(costs.stages), (costs.forward, costs.input, costs.weight)
    work = [sum(table[stage][k] for table in tables for stage in stages) for k in range(costs.microbatches)]
    rising = sorted(range(costs.microbatches), key=lambda k: (work[k], k))
    return [*rising[::2], *reversed(rising[1::2])]


def _swapped(problem: Instance, orders: Orders, order: list[int], tries: int, seed: int) -> list[int]:
    """Swaps two microbatches, `tries` times; keeps what exceeds no limit by more, then what takes no longer."""

    def judge(candidate: list[int]) -> tuple[int, int]:
        tried = problem.of(candidate)
        over = excess(tried, orders)
        return (over, 0) if over else (0, makespan(tried, orders) or 0)

    chance = random.Random(seed)
    best = judge(order)
    for _ in range(tries):
        i, j = chance.randrange(len(order)), chance.randrange(len(order))
        candidate = list(order)
        candidate[i], candidate[j] = candidate[j], candidate[i]
        found = judge(candidate)
        if found <= best:
            order, best = candidate, found
    return order
