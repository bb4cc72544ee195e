"""R actions: forwards that keep their input only, and are done again before the backward."""

from __future__ import annotations

from collections.abc import Collection

from longcat_model.pipeline.ir import Action, Kind, Row, Schedule


def recompute(schedule: Schedule, stages: Collection[int]) -> Schedule:
    """Puts R before I, or B, of every microbatch of `stages`. R does not wait for the gradient that I needs."""

    def before(action: Action) -> Row:
        again = action._replace(kind=Kind.R)
        return (again, action) if action.kind in (Kind.I, Kind.B) and action.stage in stages else (action,)

    return tuple(tuple(part for action in row for part in before(action)) for row in schedule)
