"""torch's V schedules with its own runtime: the same stages, the same microbatches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.pipelining.stage import _PipelineStageBase

from pipeline_stages import Deferring, loss_of

SCHEDULES = {"torch ZBV": ScheduleZBVZeroBubble, "torch DualPipeV": ScheduleDualPipeV}


class TorchPipeline:
    """One rank. Weight gradients are torch's own, or with `defers` those of our deferral, which a sleeper needs."""

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: int,
        modules: Mapping[int, nn.Module],
        batch: Tensor,
        count: int,
        defers: bool = True,
    ) -> None:
        self.rank, self.batch, part = rank, batch, batch[: len(batch) // count]
        stages: list[_PipelineStageBase] = []
        for stage, module in modules.items():
            whole = Deferring(module) if defers else module
            received, made = part.clone().requires_grad_(stage > 0), part.clone().requires_grad_()
            builder = whole.later if isinstance(whole, Deferring) else None
            stages.append(
                PipelineStage(whole, stage, 2 * ranks, torch.device("cpu"), received, made, dw_builder=builder)
            )
        self.schedule = SCHEDULES[name](stages, count, loss_fn=lambda out, target: loss_of(out))

    def step(self) -> None:
        if self.rank == 0:  # has the first stage and the last
            self.schedule.step(self.batch, target=self.batch, losses=[])
        else:
            self.schedule.step()
