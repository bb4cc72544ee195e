"""How a model is spread over devices and in which order they work: measured on one rank, the same on all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from longcat_model.model import LongcatNext
from longcat_model.pipeline.costs import Costs, permuted
from longcat_model.pipeline.ir import Placement, Schedule, v_placement
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.measure import measure
from longcat_model.pipeline.passes.recompute import recompute
from longcat_model.pipeline.place import place
from longcat_model.pipeline.profile import Profile, Split, stage_costs
from longcat_model.pipeline.schedules.candidates import candidates
from longcat_model.pipeline.schedules.searched import DEFAULT, Effort
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import peak_bytes, simulate
from longcat_model.pipeline.split import Microbatch, ModelStage
from longcat_model.pipeline.transport import TIMEOUT_S
from longcat_model.sequence import Batch
from longcat_model.training.microbatches import Size, cut, size

SAMPLE = 8  # steps whose microbatches say what lengths are typical


@dataclass(frozen=True, kw_only=True)
class Piping:
    """What a user may say of a pipeline; losses and gradients depend on it by rounding alone.

    Raises:
        ValueError: a number is out of range.
    """

    microbatches: int | None = None  # of a pipeline and a step, at most; None: four a device
    # Bytes that a device may hold for the backward, None: as many as V-Half holds; by the longest microbatches of the
    # steps that were measured, so that a longer one later may hold more.
    memory: int | None = None
    recompute: bool = False  # forwards keep their input alone and are done again before the backward
    any_order: bool = False  # microbatches of different lengths may run in any order, and overtake each other
    timeout_s: float = TIMEOUT_S  # the longest that a device waits for another one

    def __post_init__(self) -> None:
        for name, least, most in (("microbatches", 1, 2**16), ("memory", 1, 2**62), ("timeout_s", 1e-3, 1e6)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"train: {name} must be from {least} to {most}, got {value}")

    def most(self, devices: int) -> int:
        """Microbatches of a pipeline and a step, at most."""
        return 4 * devices if self.microbatches is None else self.microbatches


class Order(NamedTuple):
    """What a step of so many microbatches runs, and what the simulator expects of it."""

    schedule: Schedule  # lowered
    makespan_s: float
    bubble: float  # mean share of the makespan in which a device does nothing


class Weights(NamedTuple):
    """By which microbatches are told apart: what each of its positions, and of its supervised ones, costs; seconds."""

    position: float
    label: float

    def of(self, size: Size) -> float:
        return self.position * size.positions + self.label * size.labels


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plain data: every rank has the same."""

    placement: Placement  # the device of every stage
    cuts: tuple[int, ...]  # where the model's units are cut into stages: see `split`
    costs: Costs  # in seconds, of as many microbatches as a step has at most; a step has as many rows at least
    schedule: Schedule  # of F, I and W
    memory: int  # bytes that no device exceeds
    recompute: bool = False
    weights: Weights | None = None  # of a schedule for which the longest microbatch is number 0, the next one 1, ...

    @classmethod
    def of(
        cls,
        cuts: tuple[int, ...],
        costs: Costs,
        effort: Effort = DEFAULT,
        piping: Piping | None = None,
        weights: Weights | None = None,
    ) -> Plan:
        """The shortest schedule that a search finds within `piping.memory`.

        With `weights` the order of microbatches is searched too, where they differ.

        Raises:
            ValueError: no schedule fits the memory.
        """
        piping, devices, microbatches = piping or Piping(), costs.stages // 2, costs.microbatches
        plan = cls(
            placement=v_placement(devices),
            cuts=cuts,
            costs=costs,
            schedule=v_half(devices, microbatches),
            memory=0,
            recompute=piping.recompute,
            weights=weights,
        )
        half = max(peak_bytes(plan.again(plan.schedule), costs))
        memory = half if piping.memory is None else piping.memory
        found = candidates(costs, memory, effort, recompute=piping.recompute, any_order=weights is not None)
        peaks = [max(peak_bytes(plan.again(schedule), costs)) for schedule in found]
        fitting = [schedule for schedule, peak in zip(found, peaks, strict=True) if peak <= memory]
        if not fitting:
            more = "" if piping.recompute else "; with recompute it may be less"
            raise ValueError(f"train: memory must be at least {min(peaks)} bytes, got {memory}{more}")
        shortest = min(fitting, key=lambda one: simulate(plan.again(one), plan.placement, costs).makespan)
        return replace(plan, schedule=shortest, memory=memory)

    @property
    def microbatches(self) -> int:
        """Of a step, at most."""
        return self.costs.microbatches

    @property
    def recomputed(self) -> range:
        """Stages whose forwards are done again."""
        return range(len(self.placement) if self.recompute else 0)

    def again(self, schedule: Schedule) -> Schedule:
        """With recomputation: it takes the time and memory that it takes when it is lowered."""
        return recompute(schedule, self.recomputed)

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
        both = (shortened, v_half(devices, microbatches))
        fitting = [one for one in both if max(peak_bytes(self.again(one), costs)) <= self.memory]
        shortest = min(fitting, key=lambda one: simulate(self.again(one), self.placement, costs).makespan)
        lowered = lower(shortest, self.placement, microbatches, costs, self.recomputed)
        makespan = simulate(lowered, self.placement, costs).makespan
        work = sum(costs.of(action) for row in lowered for action in row)
        return Order(lowered, makespan, 1 - work / (devices * makespan) if makespan else 0.0)

    def arranged(self, parts: Sequence[Batch]) -> list[Batch]:
        """Microbatches as the schedule numbers them: as they are, or the longest first where it was made for that."""
        weights = self.weights
        if weights is None:
            return list(parts)
        return sorted(parts, key=lambda part: -weights.of(size(part)))


class Sample(NamedTuple):
    """Microbatches of some steps: what there is to measure and to plan for."""

    shares: list[list[Batch]]  # what a pipeline has of a step

    @classmethod
    def of(cls, batches: Sequence[Batch], microbatches: int, replicas: int = 1) -> Sample:
        """As steps cut their batches, for pipelines side by side."""
        shares = []
        for batch in batches:
            parts = cut(batch, microbatches * replicas)
            each = -(-len(parts) // replicas)
            shares += [parts[start : start + each] for start in range(0, len(parts), each)]
        return cls(shares)

    @property
    def longest(self) -> Batch:
        """The one that is measured, of length 1: of those that the losses have to do with, if there are any."""
        parts = (part for share in self.shares for part in share)
        return max(parts, key=lambda part: (size(part).labels > 0, size(part)))

    def is_of(self, profile: Profile, model: LongcatNext) -> bool:
        """Whether a profile is of this model, and its microbatch of length 1 as large as this sample's."""
        row, layers = model.sizes.backbone.hidden * model.embed_tokens.weight.element_size(), len(profile.layers)
        received = (profile.layers[0].received, profile.modality_losses.received)
        sizes = tuple(row * count for count in size(self.longest))
        return (layers, received) == (len(model.backbone.layers), sizes)

    def weights(self, profile: Profile) -> Weights:
        """Of a position and of a label, by the durations of the longest microbatch."""
        positions, labels = size(self.longest)
        work = sum(module.work for module in (profile.embedding, *profile.layers, profile.text_head))
        return Weights(work / positions, profile.modality_losses.work / max(labels, 1))

    def with_lengths(self, profile: Profile) -> Profile:
        """The profile of microbatches as they come, the longest first: of each place the longest of any share."""
        weights, one = self.weights(profile), size(self.longest)
        ranked = [sorted(map(size, share), key=weights.of, reverse=True) for share in self.shares]
        places = [[sizes[k] for sizes in ranked if k < len(sizes)] for k in range(max(map(len, ranked)))]
        return replace(
            profile,
            lengths=tuple(max(size.positions for size in sizes) / one.positions for sizes in places),
            loss_lengths=tuple(max(size.labels for size in sizes) / max(one.labels, 1) for sizes in places),
        )


def measured(
    model: LongcatNext,
    sample: Sample,
    lend: Callable[[ModelStage], AbstractContextManager[Any]] = nullcontext,
) -> Profile:
    """Durations of the model's modules, where the sample's tensors are; transfers are not among them. See `measure`."""
    training = model.training
    profile = measure(model.train(), Microbatch.of([sample.longest])[0], lend=lend)
    model.train(training)
    return profile


def planned(
    profile: Profile, sample: Sample, devices: int, piping: Piping | None = None, effort: Effort = DEFAULT
) -> tuple[Plan, Profile]:
    """The model cut where V-Half is fastest, and the schedule searched, by a measurement.

    Returns:
        the plan, and the profile that it follows from: with the lengths of microbatches, where their order is free.
    """
    piping, weights, count = piping or Piping(), None, len(sample.shares[0])
    most = piping.most(devices)
    if piping.any_order:
        profile, weights = sample.with_lengths(profile), sample.weights(profile)
        count = most = len(profile.lengths)
    split = place(profile, devices, count).split
    return Plan.of(unit_cuts(split), stage_costs(profile, split, most), effort, piping, weights), profile


def unit_cuts(split: Split) -> tuple[int, ...]:
    """A placement's split as cuts between the model's units.

    Example: layers (0, 1, 1, 0), the head in stage 2: embedding | layer 0 | layer 1 and text head | depth heads.

        >>> unit_cuts(Split((0, 1, 1, 0), 2))
        (1, 2, 4)
    """
    ends = accumulate(split.layers[:-1])
    return tuple(1 + layers + (stage >= split.head) for stage, layers in enumerate(ends))
