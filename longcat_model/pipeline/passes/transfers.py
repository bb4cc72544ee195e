"""SEND and RECV actions, in an order in which no way of posting them can deadlock."""

from __future__ import annotations

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import Action, Placement, Schedule, counterpart, transfer
from longcat_model.pipeline.simulate import simulate


def add_transfers(schedule: Schedule, placement: Placement, costs: Costs) -> Schedule:
    """Puts each SEND right after the action that makes what is sent, and its RECV into the receiver's row.

    All actions of all devices are taken in the order in which they end; a transfer becomes part of both rows at the
    moment when its source has ended. All rows are then parts of one order of events, so even sends that wait for their
    receivers, and receives that wait for their sends, never wait in a circle; and messages from one device to another
    arrive in the order in which they are sent. A RECV stands before whatever its device ends later, so a receive is
    posted no later than its send.
    """
    ends = simulate(schedule, placement, costs)
    time = {a: end for row, times in zip(schedule, ends.ends, strict=True) for a, end in zip(row, times, strict=True)}
    place = {action: number for number, action in enumerate(ends.order)}  # of actions that end at once, causes first
    rows: list[list[Action]] = [[] for _ in schedule]
    for action in sorted(place, key=lambda a: (time[a], place[a])):
        rows[placement[action.stage]].append(action)
        send = transfer(action, placement)
        if send is not None:
            receive = counterpart(send)
            rows[placement[send.stage]].append(send)
            rows[placement[receive.stage]].append(receive)
    return tuple(map(tuple, rows))
