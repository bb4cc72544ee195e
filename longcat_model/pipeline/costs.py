"""What the actions of a pipeline cost: durations and bytes for each stage and microbatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longcat_model.pipeline.ir import Action, Kind

Table = tuple[tuple[float, ...], ...]  # [stage][microbatch]
Sizes = tuple[tuple[int, ...], ...]  # [stage][microbatch]


@dataclass(frozen=True)
class Costs:
    """Durations in one unit of time, whichever, and sizes in bytes, for every stage and microbatch.

    Raises:
        ValueError: the tables differ in shape, or hold something negative or not finite.
    """

    forward: Table
    input: Table  # gradient of the input
    weight: Table  # gradient of the weights
    transfer: Table  # [stage]: from this stage to the one after, and of the gradient back; the last is not used
    saved: Sizes  # what a forward keeps for the backward
    received: Sizes  # of `saved`, the stage's input: all that is kept where the forward is done again

    def __post_init__(self) -> None:
        shape = (self.stages, self.microbatches)
        for name in ("forward", "input", "weight", "transfer", "saved", "received"):
            table = getattr(self, name)
            if shape[0] < 1 or (len(table), *{len(row) for row in table}) != shape:
                raise ValueError(f"costs: {name} must have one row a stage and one entry a microbatch, as forward has")
            if not all(0 <= value < math.inf for row in table for value in row):
                raise ValueError(f"costs: {name} must be finite and not negative")

    @property
    def stages(self) -> int:
        return len(self.forward)

    @property
    def microbatches(self) -> int:
        return len(self.forward[0]) if self.forward else 0

    def of(self, action: Action) -> float:
        """Duration of an action on its device; transfers go on beside the device's work and cost it nothing."""
        kind, (stage, _, microbatch) = action.kind, action
        if kind in (Kind.F, Kind.R):
            return self.forward[stage][microbatch]
        if kind is Kind.I:
            return self.input[stage][microbatch]
        if kind is Kind.W:
            return self.weight[stage][microbatch]
        if kind is Kind.B:
            return self.input[stage][microbatch] + self.weight[stage][microbatch]
        return 0.0

    def stage_work(self, stage: int) -> float:
        """Duration of all that a stage does."""
        return sum(map(sum, (self.forward[stage], self.input[stage], self.weight[stage])))


def uniform(
    stages: int,
    microbatches: int,
    forward: float = 1.0,
    input: float = 1.0,
    weight: float = 1.0,
    transfer: float = 0.0,
    *,
    stage_scales: Sequence[float] | None = None,
    microbatch_scales: Sequence[float] | None = None,
    saved: int = 1000,
) -> Costs:
    """The same cost everywhere, or scaled by stage and by microbatch (a microbatch's scale counts for its bytes too).

    Transfers take as long for each; without recomputation sizes matter only in proportion.
    """
    by_stage = stage_scales or [1.0] * stages
    by_microbatch = microbatch_scales or [1.0] * microbatches

    def table(duration: float) -> Table:
        return tuple(tuple(duration * a * b for b in by_microbatch) for a in by_stage)

    sizes = tuple(tuple(round(saved * scale) for scale in by_microbatch) for _ in by_stage)
    return Costs(
        forward=table(forward),
        input=table(input),
        weight=table(weight),
        transfer=tuple((transfer,) * microbatches for _ in by_stage),
        saved=sizes,
        received=tuple(tuple(size // 10 for size in row) for row in sizes),
    )


def permuted(costs: Costs, order: Sequence[int]) -> Costs:
    """Costs whose microbatch k is microbatch `order[k]` of what is given."""

    def pick(table: tuple) -> tuple:
        return tuple(tuple(row[k] for k in order) for row in table)

    return Costs(*(pick(getattr(costs, name)) for name in costs.__dataclass_fields__))
