"""How a model is spread over devices and in which order they work: measured on one rank, the same on all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from longcat_model.model import LongcatNext
from longcat_model.pipeline.costs import Costs, permuted
from longcat_model.pipeline.ir import Placement, Schedule, v_placement
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.measure import measure
from longcat_model.pipeline.place import place
from longcat_model.pipeline.profile import Profile, Split, stage_costs
from longcat_model.pipeline.schedules.searched import DEFAULT, Effort, searched
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.schedules.walk import is_compiled
from longcat_model.pipeline.simulate import simulate
from longcat_model.pipeline.split import Microbatch, ModelStage
from longcat_model.sequence import Batch
from longcat_model.training.microbatches import cut


class Order(NamedTuple):
    """What a step of so many microbatches runs, and what the simulator expects of it."""

    schedule: Schedule  # lowered
    makespan_s: float
    bubble: float  # mean share of the makespan in which a device does nothing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plain data: every rank has the same."""

    placement: Placement  # the device of every stage
    cuts: tuple[int, ...]  # where the model's units are cut into stages: see `split`
    costs: Costs  # in seconds, of as many microbatches as a step has at most; a step has as many rows at least
    schedule: Schedule  # of F, I and W

    @classmethod
    def of(cls, cuts: tuple[int, ...], costs: Costs, effort: Effort = DEFAULT) -> Plan:
        """The shortest schedule that a search finds within the memory of V-Half, or V-Half itself."""
        devices = costs.stages // 2
        placement, plain = v_placement(devices), v_half(devices, costs.microbatches)
        # One device never waits; and without the compiled module a search would take longer than what it saves.
        candidates = [plain, *([searched(costs, effort=effort)] if devices > 1 and is_compiled() else [])]
        schedule = min(candidates, key=lambda one: simulate(one, placement, costs).makespan)
        return cls(placement=placement, cuts=cuts, costs=costs, schedule=schedule)

    @property
    def microbatches(self) -> int:
        """Of a step, at most."""
        return self.costs.microbatches

    @property
    def digest(self) -> str:
        """The same for the same plan and no other."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def order(self, microbatches: int) -> Order:
        """What a step of so many microbatches, or fewer than the most, runs.

        A schedule without its last microbatches is one of the others, and holds no more than it did.
        """
        devices, costs = max(self.placement) + 1, permuted(self.costs, range(microbatches))
        shortened = tuple(tuple(a for a in row if a.microbatch < microbatches) for row in self.schedule)
        candidates = (shortened, v_half(devices, microbatches))
        shortest = min(candidates, key=lambda one: simulate(one, self.placement, costs).makespan)
        lowered = lower(shortest, self.placement, microbatches, costs)
        makespan = simulate(lowered, self.placement, costs).makespan
        work = sum(map(costs.stage_work, range(costs.stages)))
        return Order(lowered, makespan, 1 - work / (devices * makespan) if makespan else 0.0)


def measured_plan(
    model: LongcatNext,
    devices: int,
    batch: Batch,
    microbatches: int,
    effort: Effort = DEFAULT,
    lend: Callable[[ModelStage], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Plan, Profile]:
    """The model cut where V-Half is fastest, and the schedule searched, by a measurement on a microbatch of `batch`.

    Args:
        batch: where the model computes.
        microbatches: of a step, at most.
        lend: see `measure`.

    Returns:
        the plan, and the measurement that it follows from: seconds.
    """
    parts = Microbatch.of(cut(batch, microbatches))
    longest = max(parts, key=lambda part: part.batch.inputs.text.numel())
    training = model.training
    profile = measure(model.train(), longest, lend=lend)
    model.train(training)
    split = place(profile, devices, len(parts)).split
    return Plan.of(unit_cuts(split), stage_costs(profile, split, microbatches), effort), profile


def unit_cuts(split: Split) -> tuple[int, ...]:
    """A placement's split as cuts between the model's units.

    Example: layers (0, 1, 1, 0), the head in stage 2: embedding | layer 0 | layer 1 and text head | depth heads.

        >>> unit_cuts(Split((0, 1, 1, 0), 2))
        (1, 2, 4)
    """
    ends = accumulate(split.layers[:-1])
    return tuple(1 + layers + (stage >= split.head) for stage, layers in enumerate(ends))
