"""FREE actions: when nothing of a microbatch is kept on a stage any longer."""

from __future__ import annotations

from longcat_model.pipeline.ir import Action, Kind, Row, Schedule


def free_activations(schedule: Schedule) -> Schedule:
    """Puts FREE right after the last action that reads what the forward has saved: W, or B."""

    def after(action: Action) -> Row:
        free = action._replace(kind=Kind.FREE)
        return (action, free) if action.kind in (Kind.W, Kind.B) else (action,)

    return tuple(tuple(part for action in row for part in after(action)) for row in schedule)
