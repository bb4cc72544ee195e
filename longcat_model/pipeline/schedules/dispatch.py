"""Schedules from rules: whenever a device is free it does the most urgent action that is ready and fits its memory.

Microbatches need not stay in order, so that short ones overtake a long one. Nothing waits for ever: before its second
stage a device never holds so much that the second stage of one of its microbatches would not fit any more.

The definition is the Python here; where the compiled module is there, its `schedule_dispatch` gives the same schedules.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from longcat_model.pipeline.schedules.walk import Instance, Orders, compiled

F, I, W = range(3)  # noqa: E741


class Rules(NamedTuple):
    """What devices go by."""

    entry: tuple[int, ...]  # the order in which the first stage takes microbatches
    rank: tuple[int, ...]  # [microbatch] who comes first of those that are equally urgent: the lowest
    urgency: tuple[int, ...]  # of F, I and W in the first half of the stages, and in the second: the lowest comes first
    kept: tuple[int, ...]  # [device] bytes that its first stage leaves free at least


def dispatch(problem: Instance, rules: Rules) -> Orders | None:
    """The schedule that the rules give, of a V placement; None where a microbatch never fits."""
    native = compiled()
    if native is None:
        return dispatch_in_python(problem, rules)
    found: Orders = native.schedule_dispatch(*problem.arguments, *rules)
    return found if len(found) else None


def dispatch_in_python(problem: Instance, rules: Rules) -> Orders | None:
    """`dispatch` as it is defined."""
    devices = [_Device(problem, rules, number) for number in range(len(problem.limits))]
    devices[0].ready.append((F, rules.entry[0], 0))
    events = [(0, number) for number in range(len(devices))]
    while events:
        time, number = heapq.heappop(events)
        action = devices[number].choose(time)
        if action is None:
            continue
        free = devices[number].run(*action, time)
        heapq.heappush(events, (free, number))
        for task, microbatch, ready in _results(problem, rules, *action, free):
            other = devices[problem.placement[task // 3]]
            other.ready.append((task, microbatch, ready))
            heapq.heappush(events, (max(ready, other.free), other.number))
    ran = [action for device in devices for action in device.ran]
    return np.array(ran, np.int32) if len(ran) == problem.durations.size else None


class _Device:
    """One device, its time and its memory."""

    def __init__(self, problem: Instance, rules: Rules, number: int) -> None:
        self.problem, self.rules, self.number = problem, rules, number
        self.ready: list[tuple[int, int, int]] = []  # (3 * stage + kind, microbatch, since when)
        self.free = self.live = self.live_first = (
            0  # when it is free; bytes that it holds, and those of its first stage
        )
        self.between: set[int] = set()  # microbatches forward through its first stage and not yet through its second
        self.ran: list[int] = []

    def choose(self, time: int) -> tuple[int, int] | None:
        """The task and microbatch that it begins now."""
        if self.free > time:
            return None
        here = (
            (self.urgency(task), self.rules.rank[microbatch], task, microbatch)
            for task, microbatch, ready in self.ready
            if ready <= time and (task % 3 != F or self.fits(task // 3, microbatch))
        )
        best = min(here, default=None)
        return None if best is None else best[2:]

    def urgency(self, task: int) -> int:
        return self.rules.urgency[3 * (task // 3 != self.number) + task % 3]

    def fits(self, stage: int, microbatch: int) -> bool:
        """Whether a forward may begin."""
        sizes, limit, size = self.problem.saved, self.problem.limits[self.number], self.problem.saved[stage, microbatch]
        if stage != self.number:
            return bool(self.live + size <= limit)
        second = len(sizes) - 1 - stage
        needed = max(sizes[second, k] for k in {*self.between, microbatch})
        own = self.live_first + size <= limit - self.rules.kept[self.number]
        return bool(own and self.live + size <= limit - needed)

    def run(self, task: int, microbatch: int, time: int) -> int:
        """Does an action and gives when it ends."""
        (stage, kind), is_first = divmod(task, 3), task // 3 == self.number
        self.ready = [one for one in self.ready if one[:2] != (task, microbatch)]
        change = (1, 0, -1)[kind] * int(self.problem.saved[stage, microbatch])
        self.live += change
        self.live_first += change if is_first else 0
        if kind == F:
            (self.between.add if is_first else self.between.discard)(microbatch)
        self.ran.append(task * self.problem.microbatches + microbatch)
        self.free = time + int(self.problem.durations[stage, kind, microbatch])
        return self.free


def _results(problem: Instance, rules: Rules, task: int, microbatch: int, end: int) -> Iterator[tuple[int, int, int]]:
    """What an action makes ready: task, microbatch, from when on."""
    (stage, kind), last = divmod(task, 3), len(problem.placement) - 1

    def there(other: int) -> int:
        moves = problem.placement[other] != problem.placement[stage]
        return end + int(problem.transfers[min(stage, other), microbatch]) * moves

    if kind == F and stage == 0 and microbatch != rules.entry[-1]:
        yield F, rules.entry[rules.entry.index(microbatch) + 1], 0
    if kind == F and stage < last:
        yield task + 3, microbatch, there(stage + 1)
    elif kind == F:
        yield task + I, microbatch, end
    if kind == I:
        yield task + 1, microbatch, end
        if stage > 0:
            yield task - 3, microbatch, there(stage - 1)
