"""REDUCE_GRAD actions: a stage's gradients are summed over its data-parallel replicas as soon as they are complete."""

from __future__ import annotations

from longcat_model.pipeline.ir import ALL, Action, Kind, Row, Schedule


def reduce_gradients(schedule: Schedule) -> Schedule:
    """Puts REDUCE_GRAD after the last W, or B, of each stage: once a step, while other stages still work."""

    def row(actions: Row) -> Row:
        last = {a.stage: place for place, a in enumerate(actions) if a.kind in (Kind.W, Kind.B)}
        reduced = ((a, Action(a.stage, Kind.REDUCE_GRAD, ALL)) for a in actions)
        return tuple(p for i, (a, end) in enumerate(reduced) for p in ((a, end) if last.get(a.stage) == i else (a,)))

    return tuple(map(row, schedule))
