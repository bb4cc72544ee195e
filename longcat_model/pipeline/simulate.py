"""Runs a schedule on paper: when each action starts and ends, what is alive, and what no order of actions could beat.

One engine serves verification and simulation: devices work through their rows in order, each action as soon as what it
needs is there. Where all of them wait, the schedule deadlocks, and the error says who waits for what.

Model: a device does one action at a time; transfers go on beside it. Without SEND and RECV actions a result is at
another device `transfer` after it was made; with them, `transfer` after both ends have been reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import ALL, SENDS, Action, Kind, Placement, Schedule, counterpart

F, I, W, B, R = Kind.F, Kind.I, Kind.W, Kind.B, Kind.R  # noqa: E741


class Deadlock(ValueError):
    """Devices wait for each other, or for what no device does."""


@dataclass(frozen=True)
class Timeline:
    """Start and end of every action, in the places that the actions have in the schedule."""

    starts: tuple[tuple[float, ...], ...]  # [device][position]
    ends: tuple[tuple[float, ...], ...]
    order: tuple[Action, ...]  # all actions of all devices, none before what it needs

    @property
    def makespan(self) -> float:
        return max((row[-1] for row in self.ends if row), default=0.0)


def simulate(schedule: Schedule, placement: Placement, costs: Costs) -> Timeline:
    """Times of a schedule whose actions all start as early as they can.

    Raises:
        Deadlock: it cannot be run to its end; names the waiting actions.
    """
    links = _Links(placement, costs, any(action.kind in SENDS for row in schedule for action in row))
    starts: list[list[float]] = [[] for _ in schedule]
    ends: list[list[float]] = [[] for _ in schedule]
    done: dict[Action, float] = {}
    order: list[Action] = []
    waiting: dict[Action, list[int]] = {}  # what has not been done -> the devices that wait for it
    runnable = list(reversed(range(len(schedule))))
    while runnable:
        device = runnable.pop()
        for action in schedule[device][len(ends[device]) :]:
            ready = ends[device][-1] if ends[device] else 0.0
            needs = links.needs(action)
            missing = next((need for need, _ in needs if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(device)
                break
            start = max([ready, *(done[need] + delay for need, delay in needs)])
            starts[device].append(start)
            ends[device].append(start + costs.of(action))
            order.append(action)
            for result in _results(action):
                done[result] = ends[device][-1]
                runnable += waiting.pop(result, ())
    if waiting:
        raise Deadlock(_who_waits(schedule, waiting))
    return Timeline(tuple(map(tuple, starts)), tuple(map(tuple, ends)), tuple(order))


@dataclass(frozen=True)
class _Links:
    """Who needs whom."""

    placement: Placement
    costs: Costs
    explicit: bool  # transfers are actions of the schedule

    def needs(self, action: Action) -> list[tuple[Action, float]]:
        """What must have been done before an action, and how long before."""
        stage, kind, microbatch = action
        if kind is F:
            return self._from(action, stage - 1, F, Kind.RECV_F) if stage else []
        if kind in (I, B):
            own = (Action(stage, F, microbatch), 0.0)
            if stage == len(self.placement) - 1:
                return [own]
            return [own, *self._from(action, stage + 1, I, Kind.RECV_B)]
        before = _BEFORE.get(kind)
        return [] if before is None or microbatch == ALL else [(Action(stage, before, microbatch), 0.0)]

    def _from(self, action: Action, other: int, kind: Kind, receive: Kind) -> list[tuple[Action, float]]:
        """The result of `kind` on the neighbouring stage `other`."""
        microbatch = action.microbatch
        if self.placement[other] == self.placement[action.stage]:
            return [(Action(other, kind, microbatch), 0.0)]
        delay = self.costs.transfer[min(other, action.stage)][microbatch]
        if not self.explicit:
            return [(Action(other, kind, microbatch), delay)]
        received = Action(action.stage, receive, microbatch)
        return [(received, delay), (counterpart(received), delay)]


_BEFORE = {W: I, R: F, Kind.SEND_F: F, Kind.SEND_B: I, Kind.FREE: W}


def _results(action: Action) -> tuple[Action, ...]:
    """What counts as done when an action has ended: B stands for I and W."""
    return (action, action._replace(kind=I), action._replace(kind=W)) if action.kind is B else (action,)


def _who_waits(schedule: Schedule, waiting: dict[Action, list[int]]) -> str:
    home = {action: device for device, row in enumerate(schedule) for whole in row for action in _results(whole)}
    stuck = {device: need for need, devices in waiting.items() for device in devices}
    lines = []
    for device, need in sorted(stuck.items()):
        where = f"on device {home[need]}" if need in home else "which no device does"
        lines.append(f"device {device} waits for {need} {where}")
    return "schedule: deadlock: " + "; ".join(lines)


def live_bytes(schedule: Schedule, costs: Costs) -> tuple[tuple[int, ...], ...]:
    """What is saved for the backward on each device, after each of its actions [device][position].

    A forward adds what it saves, its weight gradient takes that away, or FREE where the schedule has it. A forward that
    is done again (R) adds its input only, and R the rest.
    """
    again = {action[::2] for row in schedule for action in row if action.kind is R}
    freed = {action[::2] for row in schedule for action in row if action.kind is Kind.FREE}

    def change(action: Action) -> int:
        stage, kind, microbatch = action
        if kind in (F, R) and action[::2] in again:
            received = costs.received[stage][microbatch]
            return received if kind is F else costs.saved[stage][microbatch] - received
        if kind is F:
            return costs.saved[stage][microbatch]
        last = kind is Kind.FREE if action[::2] in freed else kind in (W, B)
        return -costs.saved[stage][microbatch] if last else 0

    def totals(row: tuple[Action, ...]) -> tuple[int, ...]:
        live, result = 0, []
        for action in row:
            live += change(action)
            result.append(live)
        return tuple(result)

    return tuple(map(totals, schedule))


def peak_bytes(schedule: Schedule, costs: Costs) -> tuple[int, ...]:
    """The most that each device ever holds for the backward."""
    return tuple(max(row, default=0) for row in live_bytes(schedule, costs))


def unit_bytes(costs: Costs, devices: int) -> float:
    """Bytes of one stage unit: what an average microbatch saves on 1 / devices of the model."""
    return sum(map(sum, costs.saved)) / (devices * costs.microbatches)


def bottleneck(placement: Placement, costs: Costs) -> float:
    """Work of the device that has the most to do."""
    work = [0.0] * (max(placement) + 1)
    for stage, device in enumerate(placement):
        work[device] += costs.stage_work(stage)
    return max(work)


def bubble(makespan: float, placement: Placement, costs: Costs) -> float:
    """Share of the makespan in which the bottleneck device does nothing."""
    return max(0.0, 1.0 - bottleneck(placement, costs) / makespan) if makespan else 0.0
