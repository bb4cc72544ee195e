"""Fills idle slots of a schedule, each as long as one F, I or W, without holding more than so many activations."""

from __future__ import annotations

from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule
from longcat_model.pipeline.simulate import simulate


def fill(schedule: Schedule, placement: Placement, limit: int, *, hoist: bool, weights_last: bool) -> Schedule:
    """Runs `schedule` in slots and gives the order that results.

    hoist: a device whose next action cannot run yet takes the first later one that can, unless that could make it hold
        more than `limit` activations before it is back in the old order. Otherwise it waits.
    weights_last: W leaves its place: it runs when its device can do nothing else, for example because it holds `limit`
        activations, in the order in which the I were.

    `schedule` must be one that runs to its end within `limit`, with W as its own action.
    """
    rows = [_Row(row, limit, hoist, weights_last) for row in schedule]
    done: set[tuple[int, Kind, int]] = set()
    while any(row.rest or row.weights for row in rows):
        ran = [row.step(done, len(placement)) for row in rows]
        done.update(action for action in ran if action is not None)
        if not any(ran):
            raise ValueError(f"schedule: no device can go on within {limit} activations")
    return tuple(tuple(row.ran) for row in rows)


class _Row:
    """One device."""

    def __init__(self, row: tuple[Action, ...], limit: int, hoist: bool, weights_last: bool) -> None:
        self.rest = [action for action in row if not (weights_last and action.kind is Kind.W)]
        self.limit, self.hoist, self.weights_last = limit, hoist, weights_last
        self.weights: list[Action] = []  # that wait for a free slot
        self.live = 0
        self.ran: list[Action] = []

    def step(self, done: set[tuple[int, Kind, int]], stages: int) -> Action | None:
        """Runs one action and gives it, or None where nothing can run."""
        position = self._choose(done, stages)
        if position is not None:
            action = self.rest.pop(position)
        elif self.weights:
            action = self.weights.pop(0)
        else:
            return None
        self.live += {Kind.F: 1, Kind.W: -1}.get(action.kind, 0)
        if self.weights_last and action.kind is Kind.I:
            self.weights.append(action._replace(kind=Kind.W))
        self.ran.append(action)
        return action

    def _choose(self, done: set[tuple[int, Kind, int]], stages: int) -> int | None:
        """The first place in the rest of the row whose action can run now."""
        frees = Kind.I if self.weights_last else Kind.W  # W follows I as soon as it must
        skipped: set[tuple[int, Kind]] = set()
        ahead = peak = self.live - len(self.weights)
        for position, action in enumerate(self.rest):
            fits = action.kind is not Kind.F or max(self.live, peak) < self.limit
            if action[:2] not in skipped and fits and _ready(action, done, stages):
                return position
            if not self.hoist:
                return None
            skipped.add(action[:2])  # the microbatches of a stage stay in order
            ahead += {Kind.F: 1, frees: -1}.get(action.kind, 0)
            peak = max(peak, ahead)
        return None


def _ready(action: Action, done: set[tuple[int, Kind, int]], stages: int) -> bool:
    stage, kind, microbatch = action
    if kind is Kind.F:
        return stage == 0 or (stage - 1, Kind.F, microbatch) in done
    if kind is Kind.W:
        return (stage, Kind.I, microbatch) in done
    ahead = (stage, Kind.F, microbatch) if stage == stages - 1 else (stage + 1, Kind.I, microbatch)
    return ahead in done


def shortest(schedules: list[Schedule], placement: Placement, microbatches: int) -> Schedule:
    """The first of those that end earliest where each F, I and W takes one slot."""
    costs = uniform(len(placement), microbatches)
    return min(schedules, key=lambda schedule: simulate(schedule, placement, costs).makespan)
