"""Training through a pipeline whose ranks do not wait for the norm of the gradient; see pipeline/validation.py."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from longcat_model.pipeline.split import Microbatch
from longcat_model.pipeline.transport import Transport
from longcat_model.pipeline.validation import PostValidation
from longcat_model.sequence import Batch
from longcat_model.training.loop import Row, Stage
from longcat_model.training.loss import LossWeights
from longcat_model.training.pipelined import Pipelined, Plan, cut, told


class _Open(NamedTuple):
    """A step that is not settled yet."""

    step: int
    microbatches: list[Microbatch]
    seconds: float


class PostValidated(Pipelined):
    """The `Engine` of one rank: weights, losses and norms are those of `Pipelined`, bit for bit.

    A step's loss and norm are known in the step after: until then `backward` gives those of the last settled step, and
    `clip` gives zero, so that the loop goes on. Forwards must change nothing but gradients.
    """

    def __init__(self, stage: Stage, plan: Plan, transport: Transport, weights: LossWeights | None = None) -> None:
        super().__init__(stage, plan, transport, weights)
        self._name, self._open, self._last = stage.name, _Open(0, [], 0.0), {"loss": 0.0}
        self._settled: dict[int, Row] = {}
        self._news: Any = None

    def restored(self, optimizer: torch.optim.Optimizer) -> None:
        super().restored(optimizer)
        others = [] if self.balancer is None else [*self.balancer.biases, *self.balancer.counts]
        self._steps = PostValidation(self.transport, optimizer, self.own, others, self._norm)

    def backward(self, batch: Batch) -> Row:
        began, random = time.perf_counter(), torch.get_rng_state()

        def stands() -> bool:
            if self._steps.is_open and not self._settle():
                torch.set_rng_state(random)
                return False
            return True

        microbatches = Microbatch.of(cut(batch.to(next(iter(self.own.values())).device), self.plan.microbatches))
        runtime = self._runtime(len(microbatches))
        result = runtime.step(microbatches, stands)
        runtime.share_tied(len(microbatches))
        self._count(result)
        self._open, self._news = _Open(-1, microbatches, time.perf_counter() - began), told(result)
        return dict(self._last)

    def clip(self, most: float) -> float:
        self._steps.begin(most, self._news)
        return 0.0

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._open = self._open._replace(step=step)

    def settled(self, rows: list[Row]) -> list[Row]:
        if self._steps.is_open:
            self._settle()
        return [row | self._settled.pop(int(row["step"]), {}) for row in rows]

    def _settle(self) -> bool:
        step, microbatches, seconds = self._open
        norm, stands, news = self._steps.settle(lambda: Pipelined.after_step(self, step))
        row = self._row(microbatches, news) | {"tokens_per_s": microbatches[0].totals.positions / seconds}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"{self._name}: loss must be finite, got {row['loss']} at step {step}")
        self._last = row
        self._settled[step] = row | {"gradient_norm": float(norm)}
        return stands
