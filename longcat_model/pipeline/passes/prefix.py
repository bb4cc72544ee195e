"""How far a step may run while it is not known yet whether the step before it stands."""

from __future__ import annotations

from longcat_model.pipeline.ir import RECEIVES, SENDS, Action, Kind, Placement, Schedule, counterpart


def revocable_prefix(schedule: Schedule, placement: Placement) -> tuple[int, ...]:
    """How many actions of each device come before any backward, and may be done again.

    The longest prefixes of forwards and their transfers such that no transfer has its SEND in one and its RECV outside,
    or the other way round: all devices can drop what they did in them and begin anew, and no message is left over.
    """
    ends = [next((i for i, a in enumerate(row) if a.kind in _FIXED), len(row)) for row in schedule]
    place = {action: i for row in schedule for i, action in enumerate(row)}
    moved = True
    while moved:
        moved = False
        for device, row in enumerate(schedule):
            for i, action in enumerate(row[: ends[device]]):
                if action.kind in SENDS | RECEIVES and _is_beyond(counterpart(action), placement, place, ends):
                    ends[device], moved = i, True
                    break
    return tuple(ends)


_FIXED = frozenset({Kind.I, Kind.W, Kind.B, Kind.R, Kind.REDUCE_GRAD})


def _is_beyond(action: Action, placement: Placement, place: dict[Action, int], ends: list[int]) -> bool:
    return place[action] >= ends[placement[action.stage]]
