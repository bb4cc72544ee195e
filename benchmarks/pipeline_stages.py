"""Stages for the benchmark of the pipeline: sleeping ones, real ones, and a count of the bytes that are alive."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_kernels import WeightGrads, defer_weight_grads
from longcat_model.pipeline.ir import Action
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.stage import Border, Output

DURATIONS = (0.030, 0.036, 0.024)  # forward, input gradient, weight gradient: F : I : W as in U1
SHORT = (0.010, 0.012, 0.008)
SIZE = (4, 8)


class Sleep(torch.autograd.Function):
    """Forward, input gradient and weight gradient that take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, durations: tuple[float, float, float]) -> Tensor:
        ctx.pending, ctx.durations = WeightGrads.current(), durations
        ctx.save_for_backward(weight)
        time.sleep(durations[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,), durations = ctx.saved_tensors, ctx.durations

        def weight_grad() -> list[Tensor]:
            time.sleep(durations[2])
            return [torch.zeros_like(weight)]

        time.sleep(durations[1])
        ctx.pending.add([weight], weight_grad)
        return grads[0], None, None


class Sleeper(nn.Module):
    """Takes its time and changes nothing; without durations it does nothing at all."""

    def __init__(self, durations: tuple[float, float, float] | None = DURATIONS) -> None:
        super().__init__()
        self.weight, self.durations = nn.Parameter(torch.zeros(1)), durations

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x
        if self.durations is not None:
            out = Sleep.apply(x, self.weight, self.durations)  # type: ignore[no-untyped-call]
        return out


class Block(nn.Module):
    """A norm and a feed-forward network, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def blocks(stage: int, width: int, count: int) -> nn.Sequential:
    """The same for each caller."""
    torch.manual_seed(stage)
    return nn.Sequential(*(Block(width) for _ in range(count)))


class OurStage:
    """A module as a stage of our runtime; microbatches are tensors of one shape."""

    def __init__(self, module: nn.Module, is_last: bool) -> None:
        self.module, self.is_last = module, is_last

    def __call__(self, hidden: Tensor | None, microbatch: Tensor) -> Output:
        out = self.module(microbatch if hidden is None else hidden)
        return Output(None, loss_of(out)) if self.is_last else Output(out)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def takes(self, microbatch: Tensor) -> Border:
        return Border(tuple(microbatch.shape), torch.float32, torch.device("cpu"))

    gives = takes


def parameters(stage: Any) -> Iterator[nn.Parameter]:
    """Of a stage of ours, or of the language model."""
    return (weight for _, weight in stage.named_parameters())


class Deferring(nn.Module):
    """A module whose weight gradients wait for `later`: gives torch's schedules a real W of ours (`dw_builder`)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._pending: deque[WeightGrads] = deque()

    def forward(self, x: Tensor) -> Tensor:
        with defer_weight_grads() as pending:
            out: Tensor = self.module(x)
        self._pending.append(pending)
        return out

    def later(self) -> Callable[..., None]:
        """Of the microbatch that has just been through backward: they come in order."""
        return self._pending.popleft().run


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def storages(values: Any) -> Iterator[tuple[torch.UntypedStorage, tuple[int, ...]]]:
    """Of all tensors in nested lists and dicts, with their shapes."""
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            yield tensor.untyped_storage(), tuple(tensor.shape)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that this thread has made and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[StorageWeakRef, int, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage, _ in storages((args, kwargs))}  # views are no new memory
        for storage, shape in storages(out):
            if storage._cdata not in self._known and storage._cdata not in given:
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), shape)
        return out

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Does not count these, such as gradients of weights."""
        for tensor in tensors:
            self._known.pop(tensor.untyped_storage()._cdata, None)

    def bytes(self, wanted: Callable[[tuple[int, ...]], bool] = lambda shape: False) -> tuple[int, int]:
        """Of all, and of those made with a shape that is `wanted`."""
        self._known = {key: found for key, found in self._known.items() if not found[0].expired()}
        sizes = [(size, wanted(shape)) for _, size, shape in self._known.values()]
        return sum(size for size, _ in sizes), sum(size for size, is_wanted in sizes if is_wanted)


class Observed(Runtime):
    """A runtime that counts bytes after each action: all, and those of tensors with a shape that is `wanted`."""

    wanted: Callable[[tuple[int, ...]], bool] = staticmethod(lambda shape: False)

    def _run(self, step: Any, actions: Sequence[Action], began: float) -> None:
        self.samples: list[tuple[Action, int, int]] = []
        with Alive() as alive:
            for action in actions:
                super()._run(step, [action], began)
                weights = (weight for stage in self.stages.values() for weight in parameters(stage))
                alive.forget([p.grad for p in weights if p.grad is not None])
                self.samples.append((action, *alive.bytes(self.wanted)))


class Watched(Alive):
    """Counts after every operation."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.bytes()[0])
        return out
