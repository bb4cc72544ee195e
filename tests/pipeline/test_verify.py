"""The verifier accepts what can run, and nothing else: against a runtime of a few lines that knows no verifier."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model.pipeline import ir
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import Deadlock
from longcat_model.pipeline.verify import verify


class Broken(Exception):
    """A device could not do its next action, or something is left over."""


def run(schedule: Schedule, placement: Placement, microbatches: int) -> None:
    """Runs a lowered schedule on values: a microbatch's forward is a sum over stages, its gradient another.

    A send hands over to a receiver that waits, and waits for it (rendezvous); messages of a pair of devices carry no
    names, so that the order alone decides what is received.
    """
    stages, places = len(placement), [0] * len(schedule)
    held: list[dict[tuple[str, int, int], int]] = [{} for _ in schedule]
    finished: set[tuple[int, int]] = set()
    queue = deque(range(len(schedule)))
    idle = 0
    while idle < len(schedule):
        device = queue.popleft()
        queue.append(device)
        idle += 1
        if places[device] == len(schedule[device]):
            continue
        action = schedule[device][places[device]]
        if action.kind in ir.SENDS | ir.RECEIVES:
            peer = placement[ir.counterpart(action).stage]
            if action.kind in ir.RECEIVES or places[peer] == len(schedule[peer]):
                continue
            other = schedule[peer][places[peer]]
            if other.kind not in ir.RECEIVES or placement[ir.counterpart(other).stage] != device:
                continue
            # What arrives is taken for what the receiver expects; a wrong value shows itself below.
            value = held[device].pop(("out" if action.kind is Kind.SEND_F else "back", *action[::2]), None)
            if value is None:
                raise Broken(f"{action}: nothing to send")
            held[peer]["in" if other.kind is Kind.RECV_F else "grad", other.stage, other.microbatch] = value
            places[peer] += 1
        else:
            compute(action, stages, placement, held, finished)
        places[device] += 1
        idle = 0
    if places != list(map(len, schedule)) or not whole(schedule, held, finished, stages * microbatches):
        raise Broken("something is left")


def whole(
    schedule: Schedule, held: list[dict[tuple[str, int, int], int]], finished: set[tuple[int, int]], wanted: int
) -> bool:
    """Whether all is done and nothing is left, but where there is no backward at all: what the forwards saved."""
    left = [name for mine in held for name, *_ in mine]
    if any(action.kind in (Kind.I, Kind.W, Kind.B) for row in schedule for action in row):
        return not left and len(finished) == wanted
    return left == ["saved"] * wanted


def compute(
    action: Action,
    stages: int,
    placement: Placement,
    held: list[dict[tuple[str, int, int], int]],
    finished: set[tuple[int, int]],
) -> None:
    stage, kind, k = action
    mine = held[placement[stage]]

    def take(name: str, expected: int, needed: bool = True) -> None:
        if needed and mine.pop((name, stage, k), None) != expected:
            raise Broken(f"{action}: no {name}, or a wrong one")

    def give(name: str, to: int, neighbour: str, value: int) -> None:
        """To the neighbouring stage, on the same device at once, else by way of a send."""
        if 0 <= to < stages:
            key = (neighbour, to, k) if placement[to] == placement[stage] else (name, stage, k)
            if key in mine:
                raise Broken(f"{action}: {key} is there already")
            mine[key] = value

    if kind is Kind.F:
        if ("saved", stage, k) in mine:
            raise Broken(f"{action}: has run before")
        take("in", 1000 * k + stage, needed=stage > 0)
        give("out", stage + 1, "in", 1000 * k + stage + 1)
        mine["saved", stage, k] = 1
    if kind in (Kind.I, Kind.B):
        take("grad", -1000 * k - stage, needed=stage < stages - 1)
        take("saved", 1)
        give("back", stage - 1, "grad", -1000 * k - stage + 1)
        mine["pending", stage, k] = 1
    if kind in (Kind.W, Kind.B):
        take("pending", 1)
        finished.add((stage, k))


def runs(schedule: Schedule, placement: Placement, microbatches: int) -> bool:
    try:
        run(schedule, placement, microbatches)
    except Broken:
        return False
    return True


def accepted(schedule: Schedule, placement: Placement, microbatches: int) -> bool:
    try:
        verify(schedule, placement, microbatches)
    except ValueError:
        return False
    return True


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.booleans(), st.randoms(use_true_random=False))
def test_what_the_verifier_accepts_is_what_runs(p: int, m: int, swaps: int, near: bool, chance: random.Random) -> None:
    """Valid schedules with a few actions moved, dropped or doubled: some still run, most do not."""
    placement = ir.v_placement(p)
    kept = {Kind.FREE, Kind.REDUCE_GRAD}
    rows = [list(row) for row in ir.without(lower(v_half(p, m), placement, m), kept)]
    for _ in range(swaps):
        row = chance.choice(rows)
        if not row:
            continue
        start = chance.randrange(len(row))
        moved = row.pop(start)
        what = chance.random()
        if what < 0.9:
            row.insert(
                max(0, min(len(row), start + chance.choice((-1, 1)))) if near else chance.randrange(len(row) + 1), moved
            )
        elif what < 0.95:
            row[start:start] = [moved, moved]
    schedule = tuple(map(tuple, rows))
    assert accepted(schedule, placement, m) == runs(schedule, placement, m)


def test_the_comparison_sees_both_answers() -> None:
    """So that the property above cannot hold for want of cases."""
    placement = ir.v_placement(2)
    rows = [list(row) for row in ir.without(lower(v_half(2, 3), placement, 3), {Kind.FREE, Kind.REDUCE_GRAD})]
    answers = []
    for device, row in enumerate(rows):
        for place in range(len(row) - 1):
            swapped = [list(r) for r in rows]
            swapped[device][place : place + 2] = reversed(row[place : place + 2])
            schedule = tuple(map(tuple, swapped))
            answers.append(accepted(schedule, placement, 3))
            assert answers[-1] == runs(schedule, placement, 3), ir.show(schedule)
    assert 5 < sum(answers) < len(answers) - 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 1F0", "must have one row for each of 2 devices, got 1"),
        ("0F0 0B0 1F0\n1B0", "1F0 stands on device 0, which does not have that stage"),
        ("0F0 0B0\n1F0 1F1 1B0", "1F1: microbatch must be below 1"),
        ("0F0 0B0 0B0\n1F0 1B0", "0B0 must run once, got 2 times"),
        ("0F0 0I0\n1F0 1B0", "0W0 must run once, got 0 times"),
        ("0F0 0I0 0B0\n1F0 1B0", "0I0 must run once, got 2 times"),
        ("0F0 0W0 0I0\n1F0 1B0", "0W0 must stand after 0I0 on device 0"),
        ("0F0 0R0 0B0 0FREE0\n1F0 1B0 1R0", "1R0 stands too late on device 1"),
        ("0F0 0FREE0 0B0\n1F0 1B0", "0FREE0 must stand after 0B0 or 0W0 on device 0"),
        ("0F0 0I0 0REDUCE_GRAD 0W0\n1F0 1B0", "0W0 must stand before 0REDUCE_GRAD on device 0"),
        ("0F0 0SEND_F0 0B0\n1RECV_F0 1F0 1B0", "0RECV_B0 is missing"),
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0 1SEND_F0", "1SEND_F0 carries nothing"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(ir.parse(text), (0, 1), 1)


def test_messages_must_arrive_in_the_order_of_sending() -> None:
    text = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n1RECV_F1 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1"
    with pytest.raises(ValueError, match="device 1 must receive in the order in which device 0 sends, got 1RECV_F1"):
        verify(ir.parse(text), (0, 1), 2)


def test_sends_that_wait_for_each_other_are_refused() -> None:
    """With buffers in between it would run; where a send waits for its receiver it does not."""
    text = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"
    with pytest.raises(Deadlock, match="each waits for the one before"):
        verify(ir.parse(text), (0, 1), 2)
    verify(ir.parse(text.replace("0SEND_F1 0RECV_B0", "0RECV_B0 0SEND_F1")), (0, 1), 2)


def test_forward_only_schedules_are_schedules() -> None:
    verify(ir.parse("0F0 0F1\n1F0 1F1"), (0, 1), 2)
    assert runs(ir.parse("0F0 1F0 0F1 1F1"), (0, 0), 2)
    assert not runs(ir.parse("0F0 1F0 0F1"), (0, 0), 2)
