"""I directly followed by its W becomes B, which runs the two as one backward."""

from __future__ import annotations

from longcat_model.pipeline.ir import Action, Kind, Placement, Row, Schedule, transfer


def merge_backward(schedule: Schedule, placement: Placement) -> Schedule:
    """Joins I and W where nothing is gained by splitting: no other device waits for the result of I.

    Where one waits, B would send it later by the time that W takes.
    """

    def row(actions: Row) -> Row:
        merged: list[Action] = []
        for action in actions:
            before = merged[-1] if merged else None
            if action.kind is Kind.W and before == action._replace(kind=Kind.I) and transfer(before, placement) is None:
                merged[-1] = action._replace(kind=Kind.B)
            else:
                merged.append(action)
        return tuple(merged)

    return tuple(map(row, schedule))
