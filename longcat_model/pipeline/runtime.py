"""Runs one device's actions in order: one loop for every schedule.

All state of a step is in `_Step`: tensors on their way, and what each stage keeps of each microbatch. Both are empty at
the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from longcat_kernels import WeightGrads, defer_weight_grads
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule, counterpart
from longcat_model.pipeline.passes.prefix import revocable_prefix
from longcat_model.pipeline.stage import Border, Stage
from longcat_model.pipeline.transport import PipelineError, Receipt, Transport


class Tied(NamedTuple):
    """Weights that two stages use. Where one device has both, their gradients meet in `into`'s W, as in one backward.

    What `source` leaves of them is not a gradient yet but what it is made of: `into` holds that until its own turn.
    """

    parameters: tuple[Tensor, ...]
    source: int  # the later stage
    into: int  # the earlier stage


class Ran(NamedTuple):
    """An action with when it began, having waited for what it needs, and ended: in seconds since the step began."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepResult:
    """What one device knows of a step."""

    reports: dict[tuple[int, int], Any]  # (stage, microbatch) -> the stage's report
    losses: dict[tuple[int, int], Tensor]  # (stage, microbatch) -> its share of the loss, detached
    timeline: list[Ran]
    peak_live: int  # most (stage, microbatch) pairs that were kept at once


@dataclass
class _Live:
    """What a stage keeps of one microbatch between its actions."""

    hidden: Tensor | None  # its input
    is_back: bool = False  # I has run
    out: GradientEdge | None = None  # of its output: the output itself is the next stage's to keep
    loss: GradientEdge | None = None
    pending: WeightGrads = field(default_factory=WeightGrads)


@dataclass
class _Step:
    microbatches: Sequence[Any]
    # On their way to the action that uses them: (stage, F or I, microbatch); I stands for B, too.
    values: dict[tuple[int, Kind, int], Tensor | Receipt] = field(default_factory=dict)
    live: dict[tuple[int, int], _Live] = field(default_factory=dict)
    reports: dict[tuple[int, int], Any] = field(default_factory=dict)
    losses: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    timeline: list[Ran] = field(default_factory=list)
    peak_live: int = 0
    waited_s: float = 0.0  # of the action that runs

    def put(self, stage: int, kind: Kind, microbatch: int, value: Tensor | Receipt) -> None:
        if (stage, kind, microbatch) in self.values:
            raise _impossible(Action(stage, kind, microbatch), "its input is there already")
        self.values[stage, kind, microbatch] = value

    def take(self, stage: int, kind: Kind, microbatch: int) -> Tensor:
        value = self.values.pop((stage, kind, microbatch), None)
        if value is None:
            raise _impossible(Action(stage, kind, microbatch), "its input is not there")
        if isinstance(value, Tensor):
            return value
        began = time.perf_counter()
        tensor = value.wait()
        self.waited_s += time.perf_counter() - began
        return tensor

    def drain(self) -> None:
        """Waits for what was on its way, so that it is not taken for what comes after."""
        for value in self.values.values():
            if not isinstance(value, Tensor):
                value.wait()

    def kept(self, action: Action, is_back: bool) -> _Live:
        """What the stage keeps of the action's microbatch, before its I or after."""
        live = self.live.get((action.stage, action.microbatch))
        if live is None or live.is_back != is_back:
            raise _impossible(action, "it must run once, F before I before W")
        return live


class Runtime:
    """Runs the actions of one device.

    Args:
        schedule: of all devices, with transfers; it must be valid (`verify`).
        placement: the device of every stage.
        stages: this device's, by number.
        transport: this device's end.
        tied: weights that two stages share.
        reduce: called with the number of each stage as soon as its gradients are complete, while others still work:
            where data-parallel replicas start to add theirs up. Tied weights are complete only after `share_tied`.

    Raises:
        ValueError: `stages` are not those that `placement` puts on the device, or the schedule has an action that the
            runtime cannot run.
    """

    def __init__(
        self,
        schedule: Schedule,
        placement: Placement,
        stages: Mapping[int, Stage],
        transport: Transport,
        tied: Tied | None = None,
        reduce: Callable[[int], None] | None = None,
    ) -> None:
        device = transport.device
        own = {stage for stage, where in enumerate(placement) if where == device}
        if own != set(stages):
            raise ValueError(f"runtime: stages must be {sorted(own)} on device {device}, got {sorted(stages)}")
        self.actions, self.placement, self.stages = schedule[device], placement, stages
        if unknown := {action.kind.value for action in self.actions if action.kind not in _HANDLERS}:
            raise ValueError(f"runtime: actions must be among those it runs, got {', '.join(sorted(unknown))}")
        self.transport, self.tied, self.reduce = transport, tied, reduce
        self._schedule = schedule
        self._recomputed = {(a.stage, a.microbatch) for a in self.actions if a.kind is Kind.R}
        self._trains = any(a.kind in (Kind.I, Kind.B) for a in self.actions)

    def step(self, microbatches: Sequence[Any], stands: Callable[[], bool] | None = None) -> StepResult:
        """Runs all microbatches; gradients are added to the parameters' `grad`.

        A schedule of forwards alone makes none and keeps nothing.

        Args:
            stands: called before anything is added to gradients, when forwards have run that can be done again; where
                it gives False, as it must on all devices alike, they are.

        Raises:
            PipelineError: another device was lost, hangs or failed, or a stage had a RuntimeError; names the action.
            ValueError: the schedule is not valid, or one for another number of microbatches.
        """
        began = time.perf_counter()
        step, early = _Step(microbatches), 0 if stands is None else self._revocable
        with self._telling_others():
            self._run(step, self.actions[:early], began)
            if stands is not None and not stands():
                step.drain()
                step = _Step(microbatches)
                self._run(step, self.actions[:early], began)
            self._run(step, self.actions[early:], began)
            if step.values or step.live or len(step.reports) != len(self.stages) * len(microbatches):
                raise ValueError(
                    f"runtime: the schedule must bring each of {len(microbatches)} microbatches through every stage "
                    "and leave nothing behind: `verify` says what is wrong with it"
                )
        return StepResult(step.reports, step.losses, step.timeline, step.peak_live)

    @cached_property
    def _revocable(self) -> int:
        return revocable_prefix(self._schedule, self.placement)[self.transport.device]

    def _run(self, step: _Step, actions: Sequence[Action], began: float) -> None:
        named = _range if torch.cuda.is_available() else nullcontext
        for action in actions:
            start = time.perf_counter()
            try:
                with named(action):
                    _HANDLERS[action.kind](self, step, action)
            except RuntimeError as error:  # of a stage, or of what its experts exchange with other ranks
                reason = str(error).split("\n")[0]
                raise PipelineError(f"pipeline: {action} (microbatch {action.microbatch}) stopped: {reason}") from error
            start += step.waited_s
            step.waited_s = 0.0
            step.timeline.append(Ran(action, start - began, time.perf_counter() - began))
            step.peak_live = max(step.peak_live, len(step.live))

    def share_tied(self, number: int) -> None:
        """Adds up the gradients of tied weights whose two stages are on different devices, for both of them.

        Args:
            number: the transfers go by the names of microbatches from this on; take one that no step in flight uses.
        """
        tied, device = self.tied, self.transport.device
        if tied is None or device not in (ends := [self.placement[tied.into], self.placement[tied.source]]):
            return
        if ends[0] == ends[1]:
            return
        is_early = device == ends[0]
        forth, back = Action(tied.into, Kind.SEND_F, number), Action(tied.source, Kind.SEND_B, number)
        sent, received, peer = (forth, counterpart(back), ends[1]) if is_early else (back, counterpart(forth), ends[0])
        for i, weight in enumerate(tied.parameters):
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad
            border = Border(tuple(own.shape), own.dtype, own.device)
            receipt = self.transport.receive(border, peer, received._replace(microbatch=number + i))
            self.transport.send(own, peer, sent._replace(microbatch=number + i))
            other = receipt.wait()
            weight.grad = own + other if is_early else other + own

    @contextmanager
    def _telling_others(self) -> Iterator[None]:
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.transport.fail(sys.exc_info()[1])

    def _forward(self, step: _Step, action: Action) -> None:
        stage, _, number = action
        if (stage, number) in step.reports:
            raise _impossible(action, "it must run once")
        hidden = step.take(stage, Kind.F, number) if stage else None
        live = _Live(None if hidden is None else hidden.detach().requires_grad_(self._trains))
        if self._trains:
            step.live[stage, number] = live
        out = self._compute(step, action, live, self._trains and (stage, number) not in self._recomputed)
        if out is not None:
            step.put(stage + 1, Kind.F, number, out.detach())

    def _compute(self, step: _Step, action: Action, live: _Live, keep: bool) -> Tensor | None:
        """Runs the stage on what `live` holds, and puts into it what backward needs if it is to `keep` that."""
        place = (action.stage, action.microbatch)
        with torch.set_grad_enabled(keep), defer_weight_grads() as pending:
            output = self.stages[action.stage](live.hidden, step.microbatches[action.microbatch])
        pending.extend(live.pending)  # of tied weights, from a later stage, if this is done again
        live.pending = pending
        if keep:
            live.out, live.loss = _edge(output.hidden), _edge(output.loss)
        step.reports[place] = output.report
        if output.loss is not None:
            step.losses[place] = output.loss.detach()
        return output.hidden

    def _recompute(self, step: _Step, action: Action) -> None:
        live = step.kept(action, is_back=False)
        if live.out is not None or live.loss is not None:
            raise _impossible(action, "it must run once")
        self._compute(step, action, live, True)

    def _backward_input(self, step: _Step, action: Action) -> None:
        stage, _, number = action
        live = step.kept(action, is_back=False)
        live.is_back = True
        roots = {edge: torch.ones_like(step.losses[stage, number]) for edge in (live.loss,) if edge is not None}
        if stage + 1 < len(self.placement):
            grad = step.take(stage, Kind.I, number)
            # An empty gradient reaches no weight: none must get zeros from it that one process would not give it.
            roots |= {edge: grad for edge in (live.out,) if edge is not None and grad.numel()}
        if roots:
            torch.autograd.backward(list(roots), list(roots.values()))
        if live.hidden is not None:
            found = live.hidden.grad
            step.put(stage - 1, Kind.I, number, torch.zeros_like(live.hidden) if found is None else found)
        live.hidden = live.out = live.loss = None
        tied = self.tied
        if tied is not None and stage == tied.source and (tied.into, number) in step.live:
            step.live[tied.into, number].pending.extend(live.pending.take(tied.parameters))

    def _backward_weights(self, step: _Step, action: Action) -> None:
        step.kept(action, is_back=True).pending.run()
        del step.live[action.stage, action.microbatch]

    def _backward(self, step: _Step, action: Action) -> None:
        self._backward_input(step, action)
        self._backward_weights(step, action)

    def _send(self, step: _Step, action: Action) -> None:
        stage, kind, number = action
        to, wanted = (stage + 1, Kind.F) if kind is Kind.SEND_F else (stage - 1, Kind.I)
        tensor = step.take(to, wanted, number)
        if tensor.numel():  # both ends know of an empty one
            self.transport.send(tensor, self.placement[to], action)

    def _receive(self, step: _Step, action: Action) -> None:
        stage, kind, number = action
        microbatch = step.microbatches[number]
        if kind is Kind.RECV_F:
            border, source, wanted = self.stages[stage].takes(microbatch), stage - 1, Kind.F
        else:
            border, source, wanted = self.stages[stage].gives(microbatch), stage + 1, Kind.I
        is_empty = 0 in border.shape
        value = border.empty() if is_empty else self.transport.receive(border, self.placement[source], action)
        step.put(stage, wanted, number, value)

    def _reduce(self, step: _Step, action: Action) -> None:
        if self.reduce is not None:
            self.reduce(action.stage)

    def _free(self, step: _Step, action: Action) -> None:
        if (action.stage, action.microbatch) in step.live:
            raise _impossible(action, "W must come first")


_HANDLERS: dict[Kind, Callable[[Runtime, _Step, Action], None]] = {
    Kind.F: Runtime._forward,
    Kind.R: Runtime._recompute,
    Kind.I: Runtime._backward_input,
    Kind.W: Runtime._backward_weights,
    Kind.B: Runtime._backward,
    Kind.SEND_F: Runtime._send,
    Kind.SEND_B: Runtime._send,
    Kind.RECV_F: Runtime._receive,
    Kind.RECV_B: Runtime._receive,
    Kind.FREE: Runtime._free,
    Kind.REDUCE_GRAD: Runtime._reduce,
}


def _impossible(action: Action, why: str) -> ValueError:
    return ValueError(f"runtime: {action} cannot run here, {why}: `verify` says what is wrong with the schedule")


def _edge(tensor: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor is not None and tensor.requires_grad else None


@contextmanager
def _range(action: Action) -> Iterator[None]:
    """Shows the action in a profiler of CUDA."""
    torch.cuda.nvtx.range_push(str(action))
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
