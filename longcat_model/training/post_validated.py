"""Training through a pipeline whose ranks do not wait for the norm of the gradient; see pipeline/validation.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from longcat_model.pipeline.split import Microbatch
from longcat_model.pipeline.validation import PostValidation
from longcat_model.sequence import Batch
from longcat_model.training.loop import Row
from longcat_model.training.loss import Totals
from longcat_model.training.pipelined import Pipelined, told
from longcat_model.training.plan import Order
from longcat_model.training.rates import memory_bytes


class _Open(NamedTuple):
    """A step that is not settled yet."""

    totals: Totals
    order: Order
    step: int = -1


class PostValidated(Pipelined):
    """The `Engine` of one rank: weights, losses and norms are those of `Pipelined`, bit for bit.

    A step's loss and norm are known in the step after: until then `backward` gives those of the last settled step, and
    `clip` gives zero, so that the loop goes on. Forwards must change nothing but gradients. Ranks with the same stages
    wait for each other's gradients, but not for those of the other devices.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps: PostValidation | None = None
        self._open: _Open | None = None
        self._news: Any = None
        self._last: Row = {"loss": 0.0}
        self._known: dict[int, Row] = {}

    def backward(self, batch: Batch) -> Row:
        random, parts = torch.get_rng_state(), self._parts(batch)
        totals, share = Totals.of(parts), self.plan.arranged(self.replicas.share(parts))
        runtime, order = self._runtime(len(share))

        def microbatches() -> list[Microbatch]:
            used = None if self.balancer is None else self.balancer.use()
            return [Microbatch(part, totals, used) for part in share]

        own = microbatches()

        def stands() -> bool:
            if self._open is None or self._settle(self._open):
                return True
            torch.set_rng_state(random)
            own[:] = microbatches()
            return False

        result = runtime.step(own, stands)
        self._share_tied(runtime, len(own))
        self._news = told(result, memory_bytes(self._device))
        self._count(self.replicas.gather(self._news))
        self._finish_adding_up()
        self._open = _Open(totals, order)
        return dict(self._last)

    def clip(self, most: float, optimizer: torch.optim.Optimizer) -> float:
        if self._steps is None:
            balancer = self.balancer
            others = [] if balancer is None else [*balancer.biases, *balancer.counts, *balancer.before]
            self._steps = PostValidation(self.transport, optimizer, self.own, others, self._norm)
        self._steps.begin(most, self._news)
        return 0.0

    def after_step(self, step: int) -> None:
        super().after_step(step)
        assert self._open is not None
        self._open = self._open._replace(step=step)

    def settled(self, rows: list[Row]) -> list[Row]:
        if self._open is not None:
            self._settle(self._open)
        return [row | self._known.pop(int(row["step"]), {}) for row in rows]

    def _settle(self, last: _Open) -> bool:
        assert self._steps is not None
        norm, stands, news = self._steps.settle(lambda: Pipelined.after_step(self, last.step))
        self._open = None
        row = self._row(news, last.totals)
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"loss must be finite, got {row['loss']} at step {last.step}")
        self._last = row | {"planned_bubble": last.order.bubble, "planned_s": last.order.makespan_s}
        self._known[last.step] = self._last | {"gradient_norm": float(norm)}
        return stands
