"""What every schedule must obey; run after each pass and before a schedule runs."""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

from longcat_model.pipeline.costs import Costs, uniform
from longcat_model.pipeline.ir import (
    OF_STAGE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Placement,
    Row,
    Schedule,
    counterpart,
    transfer,
)
from longcat_model.pipeline.simulate import Deadlock, Timeline, simulate

F, I, W, B, R = Kind.F, Kind.I, Kind.W, Kind.B, Kind.R  # noqa: E741


def verify(schedule: Schedule, placement: Placement, microbatches: int, costs: Costs | None = None) -> Timeline:
    """Checks a schedule and gives its times under `costs` (where None: each F, I and W takes 1, a transfer nothing).

    Checked: each action stands on its stage's device and is there once; each microbatch goes through each stage forward
    and, unless no backward is there at all, backward; each order that data dictates; with SEND and RECV actions, that
    each has its counterpart, that messages of two devices arrive in the order in which they are sent, and that nothing
    deadlocks even where a send waits for its receiver and a receiver for its send.

    Raises:
        Deadlock: devices wait for each other for ever.
        ValueError: anything else of the above is broken; the message names the action.
    """
    _check_actions(schedule, placement, microbatches)
    _check_complete(schedule, len(placement), microbatches)
    for device, row in enumerate(schedule):
        _check_row(row, f"device {device}")
    if any(action.kind in SENDS | RECEIVES for row in schedule for action in row):
        _check_transfers(schedule, placement)
        _check_rendezvous(schedule)
    return simulate(schedule, placement, costs or uniform(len(placement), microbatches))


def _check_actions(schedule: Schedule, placement: Placement, microbatches: int) -> None:
    if len(schedule) != max(placement) + 1:
        raise ValueError(
            f"schedule: it must have one row for each of {max(placement) + 1} devices, got {len(schedule)}"
        )
    for device, row in enumerate(schedule):
        for action, count in Counter(row).items():
            if action.stage >= len(placement) or placement[action.stage] != device:
                raise ValueError(f"schedule: {action} stands on device {device}, which does not have that stage")
            if action.kind not in OF_STAGE and not 0 <= action.microbatch < microbatches:
                raise ValueError(f"schedule: {action}: microbatch must be below {microbatches}")
            if count > 1:
                raise ValueError(f"schedule: {action} must run once, got {count} times")


def _check_complete(schedule: Schedule, stages: int, microbatches: int) -> None:
    there = {action for row in schedule for action in row}
    backward = any(action.kind in (I, W, B) for action in there)

    def need(present: Iterable[bool], what: Action) -> None:
        if sum(present) != 1:
            raise ValueError(f"schedule: {what} must run once, got {sum(present)} times")

    for stage in range(stages):
        for microbatch in range(microbatches):
            need([Action(stage, F, microbatch) in there], Action(stage, F, microbatch))
            if backward:
                whole = Action(stage, B, microbatch)
                for part in (I, W):
                    need([whole in there, whole._replace(kind=part) in there], whole._replace(kind=part))


# Kind -> the kinds of which one must stand earlier on the same device, for the same stage and microbatch.
_AFTER = {
    I: {F},
    B: {F},
    W: {I},
    R: {F},
    Kind.SEND_F: {F},
    Kind.SEND_B: {I, B},
    Kind.FREE: {W, B},
}
_LAST = {Kind.FREE}  # nothing of the stage and microbatch may stand after these, but what sends
_BEFORE_BACKWARD = {Kind.RECV_B, R}  # must stand before I or B, where they are there


def _check_row(row: Row, where: str) -> None:
    """The orders that hold on one device."""
    seen: dict[tuple[int, int], set[Kind]] = {}
    closed: set[int] = set()
    for action in row:
        stage, kind, microbatch = action
        before = seen.setdefault((stage, microbatch), set())
        if kind in _AFTER and not before & _AFTER[kind]:
            earlier = " or ".join(sorted(f"{stage}{other.value}{microbatch}" for other in _AFTER[kind]))
            raise ValueError(f"schedule: {action} must stand after {earlier} on {where}")
        late = (kind in _BEFORE_BACKWARD and before & {I, B}) or (kind is Kind.RECV_F and F in before)
        if late or (before & _LAST and kind not in SENDS):
            raise ValueError(f"schedule: {action} stands too late on {where}")
        if kind in (W, B) and stage in closed:
            raise ValueError(f"schedule: {action} must stand before {stage}REDUCE_GRAD on {where}")
        before.add(kind)
        if kind is Kind.REDUCE_GRAD:
            closed.add(stage)


def _check_transfers(schedule: Schedule, placement: Placement) -> None:
    """Every result that another device needs is sent and received, nothing else is, and in one order."""
    there = {action for row in schedule for action in row}
    wanted = {send for action in there if (send := transfer(action, placement)) is not None}
    wanted |= {counterpart(send) for send in wanted}
    got = {action for action in there if action.kind in SENDS | RECEIVES}
    for action in sorted(wanted ^ got):
        raise ValueError(f"schedule: {action} {'is missing' if action in wanted else 'carries nothing'}")
    for sender in range(len(schedule)):
        for receiver in range(len(schedule)):
            sent = [counterpart(action) for action in _messages(schedule[sender], SENDS, receiver, placement)]
            received = list(_messages(schedule[receiver], RECEIVES, sender, placement))
            for one, other in zip(sent, received, strict=True):
                if one != other:
                    raise ValueError(
                        f"schedule: device {receiver} must receive in the order in which device {sender} sends, "
                        f"got {other} where {counterpart(one)} is sent"
                    )


def _messages(row: Row, kinds: frozenset[Kind], peer: int, placement: Placement) -> Iterator[Action]:
    return (action for action in row if action.kind in kinds and placement[counterpart(action).stage] == peer)


def _check_rendezvous(schedule: Schedule) -> None:
    """A send and its receive as one event of both devices: then an order of all events must exist."""

    def event(action: Action) -> Action:
        return counterpart(action) if action.kind in RECEIVES else action

    graph: graphlib.TopologicalSorter[Action] = graphlib.TopologicalSorter()
    for row in schedule:
        for first, second in pairwise(map(event, row)):
            graph.add(second, first)
    try:
        graph.prepare()
    except graphlib.CycleError as error:
        raise Deadlock(
            f"schedule: deadlock: each waits for the one before: {' '.join(map(str, error.args[1]))}"
        ) from None
