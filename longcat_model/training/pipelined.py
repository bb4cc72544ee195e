"""A stage of training on the ranks of a pipeline: the same losses, checkpoints and metrics as in one process.

Every rank draws the same batches (ids are tiny), cuts them into microbatches and runs its stages of the model. What a
checkpoint holds does not depend on how many ranks wrote it, so a run may go on with another number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longcat_model.model import LongcatNext
from longcat_model.pipeline.ir import Placement, v_placement
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.measure import measure
from longcat_model.pipeline.place import place
from longcat_model.pipeline.profile import Split
from longcat_model.pipeline.runtime import Runtime, StepResult
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.split import Microbatch, split, tied
from longcat_model.pipeline.transport import Distributed, Transport
from longcat_model.pipeline.validation import gradient_norms
from longcat_model.sequence import Batch, Inputs, Targets
from longcat_model.training.balance import Balancer
from longcat_model.training.loop import Row, Stage, train
from longcat_model.training.loss import LossWeights, Metrics, Terms, join, means, merge, regularizer_metrics


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is spread over devices."""

    placement: Placement  # the device of every stage
    cuts: tuple[int, ...]  # where the model's units are cut into stages: see `split`
    microbatches: int  # of a step, at most; a step has as many rows at least


def v_half_plan(model: LongcatNext, devices: int, batch: Batch, microbatches: int | None = None) -> Plan:
    """V-Half, with the model cut where it is fastest by a measurement of its modules on a microbatch of `batch`.

    Args:
        microbatches: None: four a device.
    """
    most = microbatches or 4 * devices
    parts = Microbatch.of(cut(batch.to(model.embed_tokens.weight.device), most))
    longest = max(parts, key=lambda part: part.batch.inputs.text.numel())
    training = model.training
    split = place(measure(model.train(), longest), devices, len(parts)).split
    model.train(training)
    return Plan(placement=v_placement(devices), cuts=unit_cuts(split), microbatches=most)


def unit_cuts(split: Split) -> tuple[int, ...]:
    """A placement's split as cuts between the model's units.

    Example: layers (0, 1, 1, 0), the head in stage 2: embedding | layer 0 | layer 1 and text head | depth heads.

        >>> unit_cuts(Split((0, 1, 1, 0), 2))
        (1, 2, 4)
    """
    ends = accumulate(split.layers[:-1])
    return tuple(1 + layers + (stage >= split.head) for stage, layers in enumerate(ends))


class Pipelined:
    """The `Engine` of one rank.

    Args:
        stage: its module is a `LongcatNext`, whole until training begins; `stage.loss` is not called.
        transport: this rank's end.
        weights: of the loss.
    """

    def __init__(self, stage: Stage, plan: Plan, transport: Transport, weights: LossWeights | None = None) -> None:
        if plans := {theirs for theirs in transport.gather(plan) if theirs != plan}:
            raise ValueError(f"Pipelined: all ranks must have the plan {plan}, got {plans}")
        self.model, self.parameters, self.plan = _language_model(stage), stage.parameters, plan
        self.transport, self.weights = transport, weights or LossWeights()
        stages = split(self.model, plan.cuts, self.weights)
        self.stages = {s: stages[s] for s, device in enumerate(plan.placement) if device == transport.device}
        self.balancer = None if stage.after_step is None else Balancer(self.model, self.model.sizes.backbone.experts)
        self._runtimes: dict[int, Runtime] = {}

    @property
    def leads(self) -> bool:
        return self.transport.device == 0

    @cached_property
    def own(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the model."""
        return {name: weight for stage in self.stages.values() for name, weight in stage.named_parameters()}

    def restored(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives back the memory of all that other ranks have."""
        for name, weight in self.model.named_parameters():
            if name not in self.own:
                weight.data = weight.data.new_empty(0)
                optimizer.state.pop(weight, None)

    def backward(self, batch: Batch) -> Row:
        began = time.perf_counter()
        microbatches = Microbatch.of(cut(batch.to(next(iter(self.own.values())).device), self.plan.microbatches))
        runtime = self._runtime(len(microbatches))
        result = runtime.step(microbatches)
        runtime.share_tied(len(microbatches))
        self._count(result)
        row = self._row(microbatches, self.transport.gather(told(result)))
        return row | {"tokens_per_s": microbatches[0].totals.positions / (time.perf_counter() - began)}

    def _count(self, result: StepResult) -> None:
        if self.balancer is not None:
            for report in result.reports.values():
                for layer, counts in report.choices.items():
                    self.balancer.add(layer, counts)

    def _runtime(self, microbatches: int) -> Runtime:
        if microbatches not in self._runtimes:
            table = tied(self.model, len(self.plan.placement))
            placement = self.plan.placement
            schedule = lower(v_half(self.transport.devices, microbatches), placement, microbatches)
            self._runtimes[microbatches] = Runtime(schedule, placement, self.stages, self.transport, table)
        return self._runtimes[microbatches]

    def _row(self, microbatches: list[Microbatch], everyone: list[Any]) -> Row:
        """Loss and metrics of the global batch, as `loss` has them, of what all ranks have told."""
        reports = {place: report for told, _, _ in everyone for place, report in told.items()}
        stages = range(len(self.plan.placement))
        terms = [join([reports[stage, number][0] for stage in stages]) for number in range(len(microbatches))]
        losses = [_total(part, self.weights, microbatches[0]) for part in terms]
        metrics = means(merge(found for _, found in reports.values())) | regularizer_metrics(terms, losses[0])
        row = {"loss": float(sum(losses[1:], losses[0])), **{name: float(value) for name, value in metrics.items()}}
        idle = 1 - sum(busy for _, busy, _ in everyone) / len(everyone) / max(end for _, _, end in everyone)
        return row | {"bubble": idle}

    def clip(self, most: float) -> float:
        everyone = self.transport.gather(gradient_norms(self.own))
        norm = self._norm({name: norm for found in everyone for name, norm in found.items()})
        torch.nn.utils.clip_grads_with_norm_(self.own.values(), most, norm)
        return float(norm)

    def _norm(self, everyone: Mapping[str, Tensor]) -> Tensor:
        """Of all gradients together, from the norm of each: the very sum that one process makes."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        ordered = [everyone[names[weight]] for weight in self.parameters if names[weight] in everyone]
        return torch.linalg.vector_norm(torch.stack(ordered))

    def settled(self, rows: list[Row]) -> list[Row]:
        return rows

    def after_step(self, step: int) -> None:
        if self.balancer is not None:
            self.balancer.step(step)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        module = {
            f"{prefix}.{name}": tensor.cpu()
            for stage in self.stages.values()
            for prefix, part in stage.modules()
            for name, tensor in part.state_dict().items()
        }
        found = optimizer.state_dict()
        own = {i: {key: value.cpu() for key, value in state.items()} for i, state in found["state"].items()}
        everyone = self.transport.collect((module, own))
        modules = {name: tensor for module, _ in everyone for name, tensor in module.items()}
        states = {index: state for _, states in everyone for index, state in states.items()}
        ordered = {name: modules[name] for name in self.model.state_dict() if name in modules}
        return {"module": ordered, "optimizer": found | {"state": dict(sorted(states.items()))}}


def train_pipelined(
    make: Callable[[], Stage],
    directory: Path,
    ranks: int,
    *,
    microbatches: int | None = None,
    weights: LossWeights | None = None,
    seed: int = 0,
    save_every: int = 200,
    engine: type[Pipelined] = Pipelined,
) -> bool:
    """Trains a stage on the ranks of a pipeline, or goes on from its checkpoint; see `loop.train` and `launch`.

    The trained module is in the checkpoint: `train(make(), directory)` then loads it and returns the metrics.

    Args:
        make: gives the stage, on every rank alike; picklable.
        microbatches: of a step, at most; None: four a rank.
        weights: those of the stage's loss.
        engine: `PostValidated` for ranks that do not wait for the gradient's norm.

    Returns:
        Whether this process should go on with what is done once: False on torchrun's ranks other than 0.
    """
    return launch(ranks, _train_rank, make, directory, microbatches, weights, seed, save_every, engine)


def _train_rank(
    rank: Rank,
    make: Callable[[], Stage],
    directory: Path,
    microbatches: int | None,
    weights: LossWeights | None,
    seed: int,
    save_every: int,
    kind: type[Pipelined],
) -> None:
    stage = make()
    stage.module.to(rank.device)
    transport = Distributed.connect(2 * rank.ranks, store=rank.store)
    assert transport is not None  # every rank is in the one pipeline
    # Times differ from rank to rank: the first one's are everybody's.
    mine = v_half_plan(_language_model(stage), rank.ranks, stage.batch(0), microbatches) if rank.rank == 0 else None
    engine = kind(stage, transport.gather(mine)[0], transport, weights)
    train(stage, directory, seed=seed, save_every=save_every, engine=engine)
    transport.close()


def _language_model(stage: Stage) -> LongcatNext:
    if not isinstance(stage.module, LongcatNext):
        raise ValueError(f"Pipelined: stage.module must be a LongcatNext, got {type(stage.module).__name__}")
    return stage.module


def cut(batch: Batch, most: int) -> list[Batch]:
    """Rows in at most `most` microbatches of nearly as many rows, each as long as its longest row."""
    rows = len(batch.inputs.documents)
    count = min(most, rows)
    return [_rows(batch, slice(rows * i // count, rows * (i + 1) // count)) for i in range(count)]


def _rows(batch: Batch, rows: slice) -> Batch:
    used_S = (batch.inputs.documents[rows] >= 0).any(0)
    length = int(used_S.nonzero().max()) + 1 if used_S.any() else 1
    inputs, targets = (
        {field.name: getattr(part, field.name)[rows, :length] for field in fields(part)}
        for part in (batch.inputs, batch.targets)
    )
    return Batch(Inputs(**inputs), Targets(**targets))


def told(result: StepResult) -> tuple[dict[tuple[int, int], tuple[Terms, Metrics]], float, float]:
    """What the other ranks need to know of a step here: terms and metrics, seconds of work, and seconds in all."""
    told = {place: (r.terms.map(Tensor.cpu), _cpu(r.metrics)) for place, r in result.reports.items()}
    busy = sum(ran.end_s - ran.start_s for ran in result.timeline if ran.action.kind.value in "FIWBR")
    return told, busy, result.timeline[-1].end_s


def _total(terms: Terms, weights: LossWeights, microbatch: Microbatch) -> Tensor:
    total = terms.total(weights, microbatch.totals)
    assert total is not None  # the text unit's z-loss is always there
    return total


def _cpu(metrics: Metrics) -> Metrics:
    return {name: (total.cpu(), count.cpu()) for name, (total, count) in metrics.items()}
