"""Microbatches of different lengths: in which order they go through the pipeline is free, and worth more than the rest.

Gradients are sums over microbatches, so the order changes them by rounding only. Short ones at both ends fill and drain
the pipeline quickly, long ones in the middle keep all devices busy, and short ones may overtake long ones. Rules that
say what is urgent (dispatch.py) are searched first; walks and swaps of two microbatches go on from what they give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longcat_model.pipeline.costs import Costs, permuted
from longcat_model.pipeline.ir import Schedule, v_placement
from longcat_model.pipeline.schedules.dispatch import Rules, dispatch
from longcat_model.pipeline.schedules.searched import DEFAULT, Effort, searched
from longcat_model.pipeline.schedules.walk import Instance, Orders, decode, encode, instance, makespan, walk

SWAPS, ROUNDS = 200, 8
HEAT = 0.002  # share of the makespan by which rules may at first be worse than those before


def searched_in_any_order(costs: Costs, limits: Sequence[int], effort: Effort = DEFAULT) -> Schedule:
    """As `searched`, but microbatches need not run in the order of their numbers, nor in the same on all stages.

    Raises ValueError as `searched` does.
    """
    placement, entry = v_placement(costs.stages // 2), short_at_both_ends(costs)
    problem = instance(placement, costs, limits)
    in_one_order = searched(permuted(costs, entry), limits, replace(effort, moves=effort.moves // 16, blocks=1))
    starts = [_renumbered(encode(in_one_order), entry)]
    found = (_by_rules(problem, entry, effort.tries, effort.seed + number) for number in range(effort.blocks))
    starts += [orders for orders in found if orders is not None]
    moves = effort.moves // (2 * len(starts))
    walks = [walk(problem, orders, moves, effort.reach, effort.seed, overtakes=True) for orders in starts]
    orders, _ = min(walks, key=lambda found: found[1])
    for number in range(ROUNDS):
        orders = _swapped(problem, orders, SWAPS, effort.seed + number)
        moves = effort.moves // (4 * ROUNDS)
        orders, _ = walk(problem, orders, moves, effort.reach, effort.seed + number, overtakes=True)
    return decode(orders, placement)


def differ(costs: Costs) -> bool:
    """Whether some microbatches take longer than others: else their order is worth nothing."""
    return any(len(set(row)) > 1 for table in (costs.forward, costs.input, costs.weight) for row in table)


def short_at_both_ends(costs: Costs) -> list[int]:
    """The order that begins with the shortest, ends with the next, and so on to the longest in the middle."""
    stages, tables = range(costs.stages), (costs.forward, costs.input, costs.weight)
    work = [sum(table[stage][k] for table in tables for stage in stages) for k in range(costs.microbatches)]
    rising = sorted(range(costs.microbatches), key=lambda k: (work[k], k))
    return [*rising[::2], *reversed(rising[1::2])]


def _by_rules(problem: Instance, entry: Sequence[int], tries: int, seed: int) -> Orders | None:
    """Simulated annealing of the rules, at first those that favour the longest; None where none admits all."""
    chance = random.Random(seed)
    work = problem.durations.sum(axis=(0, 1))
    rank = np.argsort(np.argsort(-work, kind="stable"), kind="stable")
    rules = Rules(tuple(entry), tuple(rank.tolist()), (0, 2, 3, 1, 2, 3), (0,) * len(problem.limits))
    orders = best = dispatch(problem, rules)
    if orders is None:
        return None
    length = shortest = makespan(problem, orders) or 0
    for number in range(tries):
        changed = _changed(rules, problem.limits, chance)
        tried = dispatch(problem, changed)
        if tried is None:
            continue
        longer = (found := makespan(problem, tried) or 0) - length
        heat = HEAT * length * (1 - number / tries)
        if longer <= 0 or chance.random() < math.exp(-longer / heat):
            rules, length = changed, found
        if found < shortest:
            best, shortest = tried, found
    return best


def _changed(rules: Rules, limits: Sequence[int], chance: random.Random) -> Rules:
    """One to three changes: a microbatch goes elsewhere in the entry or the rank, or another urgency or memory."""
    entry, rank, urgency, kept = map(list, rules)
    for _ in range(chance.choice((1, 1, 2, 3))):
        what = chance.randrange(20)
        if what < 8:
            _move_one(entry, chance)
        elif what < 14:
            by_rank = sorted(range(len(rank)), key=rank.__getitem__)
            _move_one(by_rank, chance)
            for place, microbatch in enumerate(by_rank):
                rank[microbatch] = place
        elif what < 17:
            device = chance.randrange(len(kept))
            step = limits[device] // 10
            kept[device] = min(max(kept[device] + chance.randint(-step, step), 0), 8 * step)
        else:
            urgency[chance.randrange(len(urgency))] = chance.randrange(len(urgency))
    return Rules(tuple(entry), tuple(rank), tuple(urgency), tuple(kept))


def _move_one(order: list[int], chance: random.Random) -> None:
    """Some places away, or anywhere."""
    start, near = chance.randrange(len(order)), chance.randrange(10) < 7
    end = start + chance.randint(-6, 6) if near else chance.randrange(len(order))
    order.insert(min(max(end, 0), len(order) - 1), order.pop(start))


def _renumbered(orders: Orders, numbers: Sequence[int]) -> Orders:
    """What microbatch k did, `numbers[k]` does."""
    microbatch = orders % len(numbers)
    return (orders - microbatch + np.array(numbers, np.int32)[microbatch]).astype(np.int32)


def _swapped(problem: Instance, orders: Orders, tries: int, seed: int) -> Orders:
    """Swaps two microbatches, `tries` times; keeps what fits and takes no longer."""
    chance = random.Random(seed)
    best = makespan(problem, orders)
    for _ in range(tries):
        i, j = chance.randrange(problem.microbatches), chance.randrange(problem.microbatches)
        numbers = list(range(problem.microbatches))
        numbers[i], numbers[j] = j, i
        candidate = _renumbered(orders, numbers)
        found = makespan(problem, candidate)
        if found is not None and (best is None or found <= best):
            orders, best = candidate, found
    return orders
