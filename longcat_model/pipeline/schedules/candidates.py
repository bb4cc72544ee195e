"""Schedules to choose from where memory is limited: closed forms, the one that needs least, and what a search finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import Action, Kind, Row, Schedule, v_placement
from longcat_model.pipeline.schedules.free_order import differ, searched_in_any_order, short_at_both_ends
from longcat_model.pipeline.schedules.searched import Effort, one_at_a_time, searched
from longcat_model.pipeline.schedules.v import v_half, v_min
from longcat_model.pipeline.schedules.walk import is_compiled
from longcat_model.pipeline.simulate import peak_bytes


def candidates(
    costs: Costs, memory: int, effort: Effort, *, recompute: bool = False, any_order: bool = False
) -> list[Schedule]:
    """V schedules of F, I and W, of which some may exceed `memory` bytes on a device; one needs least of all.

    Args:
        recompute: forwards will be done again (`passes.recompute`): they keep their input only.
        any_order: microbatches that differ need not run in the order of their numbers.
    """
    devices, microbatches = costs.stages // 2, costs.microbatches
    found = [v_half(devices, microbatches), v_min(devices, microbatches)]
    free = any_order and differ(costs)
    if free:
        found += [_renumbered(schedule, short_at_both_ends(costs)) for schedule in found]
    least = one_at_a_time(v_placement(devices), microbatches)
    seen, kept = (_seen(costs), _in_full(costs)) if recompute else (costs, [0] * devices)
    limits = [memory - size for size in kept]
    # One device never waits; and without the compiled module a search would take longer than what it saves.
    fits = all(peak <= limit for peak, limit in zip(peak_bytes(least, seen), limits, strict=True))
    if devices > 1 and is_compiled() and fits:
        found.append((searched_in_any_order if free else searched)(seen, limits, effort))
    found.append(least)
    return found + ([_weights_at_once(schedule) for schedule in found] if recompute else [])


def _seen(costs: Costs) -> Costs:
    """Costs for a search that knows of no recomputation: I takes the time of the forward before it, too."""
    again = tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(costs.forward, costs.input, strict=True))
    return replace(costs, input=again, saved=costs.received)


def _in_full(costs: Costs) -> list[int]:
    """[device] What the largest microbatch keeps beside its input, from its second forward to its W."""
    more = [max(a - b for a, b in zip(*rows, strict=True)) for rows in zip(costs.saved, costs.received, strict=True)]
    return [max(0, more[device], more[-1 - device]) for device in range(costs.stages // 2)]


def _weights_at_once(schedule: Schedule) -> Schedule:
    """W right behind its I: then no device keeps more than one microbatch in full."""

    def row(actions: Row) -> Row:
        rest = (action for action in actions if action.kind is not Kind.W)
        return tuple(part for a in rest for part in ((a, a._replace(kind=Kind.W)) if a.kind is Kind.I else (a,)))

    return tuple(map(row, schedule))


def _renumbered(schedule: Schedule, numbers: Sequence[int]) -> Schedule:
    """What microbatch k did, `numbers[k]` does."""
    return tuple(tuple(Action(a.stage, a.kind, numbers[a.microbatch]) for a in row) for row in schedule)
