"""Data-parallel replicas: ranks with the same stages, each in a pipeline of its own with its share of a batch.

Gradients are added up by hand, a stage at a time, as soon as the schedule says that they are complete, so that this
goes on beside what other stages still do. DistributedDataParallel and FSDP2 watch autograd for that moment, which does
not come there: weight gradients are computed apart from backward, once a microbatch.

The losses of microbatches are shares of the global batch's loss, so gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from longcat_model.pipeline.transport import TIMEOUT_S, PipelineError
from longcat_model.sequence import Batch
from longcat_model.training.microbatches import padding

BUCKET = 1 << 24  # numbers that travel together, at most, but for a larger parameter


class Replicas:
    """The ranks of a group that have the same stages; without a group, this one alone."""

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.group = group
        self.number = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)
        if group is not None:  # a mesh makes its groups with the half hour that is torch's
            _set_pg_timeout(timedelta(seconds=timeout_s), group)
        self._sums: list[_Sum] = []

    def share(self, parts: Sequence[Batch]) -> list[Batch]:
        """This replica's microbatches. All have as many: where there are too few, the last ones' are padding."""
        each = -(-len(parts) // self.count)
        own = list(parts[self.number * each : (self.number + 1) * each])
        return own + [padding(parts[0])] * (each - len(own))

    def gather(self, value: Any) -> list[Any]:
        """Every replica's value: plain data and tensors on the CPU."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            _told("gathering", self.group, lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begins to add up gradients that are complete; all replicas call it in the same order."""
        if self.group is not None and self.count > 1:
            for bucket in _buckets([p for p in parameters if p.requires_grad]):
                self._sums.append(_Sum.of(bucket, self.group))

    def finish(self) -> None:
        """Waits until all gradients are those of all replicas."""
        for one in self._sums:
            one.finish()
        self._sums.clear()


@dataclass(frozen=True)
class Groups:
    """Ranks that have the same stages, in their parts."""

    data: Replicas = field(default_factory=Replicas)  # all of them
    experts: Replicas = field(default_factory=Replicas)  # of those, the ones that share experts out with this one
    same: Replicas = field(default_factory=Replicas)  # and the ones that have the same experts as this one


class _Sum(NamedTuple):
    """Gradients on their way: numbers, and of each parameter whether it has any."""

    parameters: list[nn.Parameter]
    flat: Tensor
    work: Any
    group: dist.ProcessGroup

    @classmethod
    def of(cls, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> _Sum:
        grads = [p.grad for p in parameters]
        numbers = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        there = numbers[0].new_tensor([g is not None for g in grads])
        flat = torch.cat([*(x.flatten() for x in numbers), there])
        work = _told("adding up", group, lambda: dist.all_reduce(flat, group=group, async_op=True))
        return cls(parameters, flat, work, group)

    def finish(self) -> None:
        _told("adding up", self.group, self.work.wait)
        numbers = self.flat[: -len(self.parameters)].split([p.numel() for p in self.parameters])
        there = self.flat[-len(self.parameters) :].tolist()
        for parameter, grad, count in zip(self.parameters, numbers, there, strict=True):
            if count:  # a parameter that took no part anywhere keeps having no gradient, as in one process
                parameter.grad = grad.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In order; of one type each."""
    buckets: list[list[nn.Parameter]] = []
    for parameter in parameters:
        last = buckets[-1] if buckets else []
        fits = sum(p.numel() for p in last) + parameter.numel() <= BUCKET
        if last and fits and last[0].dtype == parameter.dtype:
            last.append(parameter)
        else:
            buckets.append([parameter])
    return buckets


def _told(what: str, group: dist.ProcessGroup | None, collective: Callable[[], Any]) -> Any:
    try:
        return collective()
    except RuntimeError as error:
        own, reason = dist.get_rank(), str(error).split("\n")[0]
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != own]
        raise PipelineError(f"pipeline: rank {own}, {what} with ranks {others}, stopped: {reason}") from error
