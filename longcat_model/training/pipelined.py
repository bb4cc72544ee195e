"""A stage of training on several ranks: the same losses, checkpoints and metrics as in one process.

Ranks are a mesh: a pipeline along one side, data-parallel replicas of it along the other. Every rank draws the same
batches (ids are tiny), cuts them into microbatches and runs its stages on its replica's share of them. What a
checkpoint holds does not depend on how many ranks wrote it, so a run may go on with another number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longcat_model.model import LongcatNext
from longcat_model.pipeline import profile
from longcat_model.pipeline.experts import is_expert
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.measure import measure_links, transfer_sizes
from longcat_model.pipeline.parts import Parts, Saved
from longcat_model.pipeline.profile import Profile
from longcat_model.pipeline.runtime import Runtime, StepResult
from longcat_model.pipeline.split import Microbatch, ModelStage, Report, split, tied
from longcat_model.pipeline.transport import Distributed, Transport
from longcat_model.pipeline.validation import Norms, gradient_norms
from longcat_model.sequence import Batch
from longcat_model.training.checkpoint import Checkpoints, Spread
from longcat_model.training.loop import Row, Stage, prefixed, train
from longcat_model.training.loss import LossWeights, Terms, Totals, join, means, merge, regularizer_metrics
from longcat_model.training.mesh import Mesh
from longcat_model.training.microbatches import cut
from longcat_model.training.plan import SAMPLE, Order, Piping, Plan, Sample, measured, planned
from longcat_model.training.rates import memory_bytes
from longcat_model.training.replicas import Groups


class Told(NamedTuple):
    """What the other ranks need to know of a step on this one; on the CPU."""

    reports: dict[tuple[int, int], Report]  # (stage, microbatch) -> report
    busy_s: float
    step_s: float
    memory_bytes: int


def told(result: StepResult, memory: int) -> Told:
    busy = sum(ran.end_s - ran.start_s for ran in result.timeline if ran.action.kind.value in "FIWBR")
    reports = {place: _cpu(report) for place, report in result.reports.items()}
    return Told(reports, busy, result.timeline[-1].end_s, memory)


class Pipelined:
    """The `Engine` of one rank.

    Args:
        stage: its module is a `LongcatNext`, which has this rank's stages at least; `stage.loss` is not called.
        transport: this rank's end.
        weights: of the loss.
        groups: this rank among those with the same stages; None: there are no others.
        group: of all ranks, for their checkpoints alone; None: the leader writes everything.
        spread: see `Checkpoints`.
    """

    def __init__(
        self,
        stage: Stage,
        plan: Plan,
        transport: Transport,
        weights: LossWeights | None = None,
        groups: Groups | None = None,
        group: dist.ProcessGroup | None = None,
        spread: Spread = dict,
    ) -> None:
        self.groups = groups or Groups()
        self.replicas = self.groups.data
        digests = self.replicas.gather(transport.gather(plan.digest))
        others = sorted({device for found in digests for device, digest in enumerate(found) if digest != plan.digest})
        if others:
            raise ValueError(f"Pipelined: all devices must have one plan, got others on {others} than on this one")
        self.model, self.learning, self.plan = _language_model(stage), stage.parameters, plan
        self.transport, self.weights, self.group, self.spread = transport, weights or LossWeights(), group, spread
        self.stages = own_stages(self.model, plan, transport.device, self.weights)
        self.balancer = stage.balancer
        # A device of a long pipeline may have no part of a short model.
        self._device = next((weight.device for weight in self.own.values()), torch.device("cpu"))
        self._tied = tied(self.model, len(plan.placement))
        self._runtimes: dict[int, tuple[Runtime, Order]] = {}

    @property
    def leads(self) -> bool:
        return self.transport.device == self.replicas.number == 0

    @cached_property
    def own(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the model."""
        return {name: weight for stage in self.stages.values() for name, weight in stage.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        module: dict[str, Tensor] = {}
        for stage in self.stages.values():
            for prefix, part in stage.modules():
                module |= prefixed(prefix, part.state_dict())
        layers = [layer for stage in self.stages.values() for layer in stage.own_layers]
        balancer = {} if self.balancer is None else self.balancer.tensors(layers)
        return prefixed("module", module) | prefixed("balancer", balancer)

    def checkpoints(self, directory: Path) -> Checkpoints:
        return Checkpoints(directory, self.group, leads=self.leads, spread=self.spread)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.own

    def backward(self, batch: Batch) -> Row:
        parts = self._parts(batch)
        used = None if self.balancer is None else self.balancer.use()
        totals, own = Totals.of(parts), self.plan.arranged(self.replicas.share(parts))
        runtime, order = self._runtime(len(own))
        result = runtime.step([Microbatch(part, totals, used) for part in own])
        self._share_tied(runtime, len(own))
        everyone: list[list[Told]] = self._gathered(told(result, memory_bytes(self._device)))
        self._count([replica[self.transport.device] for replica in everyone])
        row = self._row(everyone, totals)
        self._finish_adding_up()
        return row | {"planned_bubble": order.bubble, "planned_s": order.makespan_s}

    def _parts(self, batch: Batch) -> list[Batch]:
        return cut(batch.to(self._device), self.plan.microbatches * self.replicas.count)

    def _share_tied(self, runtime: Runtime, number: int) -> None:
        """See `Runtime.share_tied`; replicas add up the sums."""
        runtime.share_tied(number)
        self.replicas.start(weight for weight in self.own.values() if self._is_tied(weight))

    def _runtime(self, microbatches: int) -> tuple[Runtime, Order]:
        if microbatches not in self._runtimes:
            order = self.plan.order(microbatches)
            runtime = Runtime(
                order.schedule, self.plan.placement, self.stages, self.transport, self._tied, self._add_up
            )
            self._runtimes[microbatches] = runtime, order
        return self._runtimes[microbatches]

    def _add_up(self, stage: int) -> None:
        whole = [pair for pair in self.stages[stage].named_parameters() if not self._is_tied(pair[1])]
        # Of experts that are shared out, gradients are of all ranks' tokens already.
        shared = [weight for name, weight in whole if self._is_shared(name)]
        self.replicas.start(weight for name, weight in whole if not self._is_shared(name))
        self.groups.same.start(shared)

    def _is_shared(self, name: str) -> bool:
        return self.groups.experts.count > 1 and is_expert(name)

    def _is_tied(self, weight: Tensor) -> bool:
        return any(weight is one for one in self._tied.parameters)

    def _finish_adding_up(self) -> None:
        for replicas in (self.replicas, self.groups.same):
            replicas.finish()

    def _gathered(self, value: Any) -> list[list[Any]]:
        """Every device's value of every replica."""
        return self.replicas.gather(self.transport.gather(value))

    def _row(self, everyone: list[list[Told]], totals: Totals) -> Row:
        """Loss and metrics of the global batch, as `loss` has them."""
        terms: list[Terms] = []
        for replica in everyone:
            reports = {place: report for one in replica for place, report in one.reports.items()}
            stages, numbers = range(len(self.plan.placement)), sorted({number for _, number in reports})
            terms += [join([reports[stage, number].terms for stage in stages]) for number in numbers]
        losses = [_total(part, self.weights, totals) for part in terms]
        ranks = [one for replica in everyone for one in replica]
        metrics = means(merge(report.metrics for one in ranks for report in one.reports.values()))
        metrics |= regularizer_metrics(terms, losses[0])
        row = {"loss": float(sum(losses[1:], losses[0])), **{name: float(value) for name, value in metrics.items()}}
        bubble = 1 - sum(one.busy_s for one in ranks) / len(ranks) / max(one.step_s for one in ranks)
        return row | {"bubble": bubble, "memory_bytes": max(one.memory_bytes for one in ranks)}

    def _count(self, replicas: Sequence[Told]) -> None:
        """Choices on this device of all replicas go to the balancer."""
        if self.balancer is not None:
            for one in replicas:
                for report in one.reports.values():
                    for layer, counts in report.choices.items():
                        self.balancer.add(layer, counts)

    def clip(self, most: float, optimizer: torch.optim.Optimizer) -> float:
        norm = self._norm(self._gathered(gradient_norms(self.own)))
        torch.nn.utils.clip_grads_with_norm_(self.own.values(), most, norm)
        return float(norm)

    def _norm(self, everyone: Norms) -> Tensor:
        """Of all gradients together, from the norm of each on every device: the very sum that one process makes.

        Every rank computes it from the same values, of all replicas, so that all agree to the bit, and a gradient that
        is not finite on one rank alone is so for all.
        """
        found: dict[str, list[Tensor]] = {}
        for norms in chain(*everyone):
            for name, norm in norms.items():
                found.setdefault(name, []).append(norm)
        names = {weight: name for name, weight in self.model.named_parameters()}
        learning = [names[weight] for weight in self.learning if names[weight] in found]
        return torch.linalg.vector_norm(torch.stack([self._over_replicas(name, found[name]) for name in learning]))

    def _over_replicas(self, name: str, norms: list[Tensor]) -> Tensor:
        """The norm of a gradient that all replicas have, or each its part of; not finite where one of them is not."""
        shards = self.groups.experts.count if self._is_shared(name) else 1
        most = torch.stack(norms).view(-1, shards).amax(0)  # those with the same part have the same norm
        return torch.linalg.vector_norm(most) if shards > 1 else most[0]

    def after_step(self, step: int) -> None:
        if self.balancer is not None:
            self.balancer.step(step)

    def settled(self, rows: list[Row]) -> list[Row]:
        return rows

    def written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.group is not None:
            return tensors
        everyone = self.transport.gather(tensors)
        return {name: tensor for found in everyone for name, tensor in found.items()} if self.leads else {}


def train_pipelined(
    make: Callable[[LongcatNext], Stage],
    saved: Saved,
    directory: Path,
    mesh: Mesh,
    *,
    microbatches: int | None = None,
    memory: int | None = None,
    recompute: bool = False,
    any_order: bool = False,
    timeout_s: float = Piping.timeout_s,
    weights: LossWeights | None = None,
    seed: int = 0,
    save_every: int = 200,
    engine: type[Pipelined] = Pipelined,
) -> bool:
    """Trains a stage on a mesh of ranks, or goes on from its checkpoint; see `loop.train` and `launch`.

    No rank ever has more of the model in memory than its own stages, or one module while rank 0 measures. The trained
    module is in the checkpoint: `train(make(model), directory)` then loads it and returns the metrics. Those of one
    process are joined by `bubble`, the mean share of a step in which a rank does nothing; `planned_bubble` and
    `planned_s`, what the simulator expects of that and of the step's time; `memory_bytes` is the largest rank's. What
    was measured is in `profile.json`, for `longcat schedule --profile`.

    Gradients are added up microbatch after microbatch: in float32 a single pipeline has the bits of one process that
    adds them up in the same order. With `any_order` that is the schedule's order, stage by stage, and losses are those
    of another one to 1e-6. A run that goes on with as many devices, and microbatches as large, keeps to the durations
    in `profile.json` then, so that its schedule, and every bit, is the same.

    Args:
        make: gives the stage that trains a model, on every rank alike; picklable.
        saved: the model before training.
        microbatches, memory, recompute, any_order, timeout_s: see `Piping`. What a rank that waits too long says names
            the action, the other device and the microbatch.
        weights: those of the stage's loss.
        engine: `PostValidated` for ranks that do not wait for the gradient's norm.

    Returns:
        Whether this process should go on with what is done once: False on torchrun's ranks other than 0.

    Raises:
        ValueError: the mesh does not divide the model's experts, or an argument is out of range.
        ChildProcessError: a rank failed: no schedule fits the memory, a rank was lost or hangs, or what `train` raises.
    """
    piping = Piping(
        microbatches=microbatches, memory=memory, recompute=recompute, any_order=any_order, timeout_s=timeout_s
    )
    if saved.sizes.backbone.experts.real % mesh.experts:
        experts = saved.sizes.backbone.experts.real
        raise ValueError(f"train: expert-parallel must divide the {experts} experts of a layer, got {mesh.experts}")
    return launch(mesh.ranks, _Training(make, saved, directory, mesh, piping, weights, seed, save_every, engine))


@dataclass(frozen=True)
class _Training:
    """What every rank is sent, and does: see `train_pipelined`."""

    make: Callable[[LongcatNext], Stage]
    saved: Saved
    directory: Path
    mesh: Mesh
    piping: Piping
    weights: LossWeights | None
    seed: int
    save_every: int
    engine: type[Pipelined]

    def __call__(self, rank: Rank) -> None:
        experts, limit = self.saved.sizes.backbone.experts.real, self.piping.timeout_s
        transport = Distributed.connect(
            2 * self.mesh.pipeline, self.mesh.pipelines(), store=rank.store, timeout_s=limit
        )
        assert transport is not None  # every rank is in a pipeline
        groups, shards = self.mesh.connect(rank.device, experts, limit)
        parts, group = Parts(self.saved, rank.device, shards), dist.new_group(backend="gloo")
        plan = self._plan(rank, transport, group)
        for stage in own_stages(parts.model, plan, transport.device).values():
            parts.bring(stage)
        trained = self.make(parts.model)
        spread = dict if shards is None else shards.spread
        engine = self.engine(trained, plan, transport, self.weights, groups, group, spread)
        try:
            train(trained, self.directory, seed=self.seed, save_every=self.save_every, engine=engine)
        except (ValueError, OSError, FloatingPointError) as error:
            transport.fail(error)
            raise
        transport.close()

    def _plan(self, rank: Rank, transport: Transport, group: dist.ProcessGroup) -> Plan:
        """Times differ from rank to rank: the first one's are everybody's, and those of its pipeline's links."""
        first, path = rank.rank == 0, self.directory / "profile.json"
        sample, found = self._measured(rank.device, path) if first else (None, None)
        found = _shared(found, group)
        if not found.links:
            found = replace(found, links=measure_links(transport, transfer_sizes(found), rank.device))
        plan = None
        if sample is not None:
            plan, found = planned(found, sample, self.mesh.pipeline, self.piping)
            self.directory.mkdir(parents=True, exist_ok=True)
            profile.save(found, path)
        return _shared(plan, group)

    def _measured(self, device: torch.device, path: Path) -> tuple[Sample, Profile]:
        """What steps are like, and what they cost: measured, or as it was when this training began."""
        whole = Parts(self.saved, device)
        stage, free = self.make(whole.model), self.piping.any_order
        steps = reversed(range(min(SAMPLE, stage.steps) if free else 1))  # downwards: no worker prepares what follows
        batches = [stage.batch(step).to(device) for step in steps]
        sample = Sample.of(batches, self.piping.most(self.mesh.pipeline), self.mesh.data)
        if free and path.exists():
            found = profile.load(path)
            if len(found.links) == self.mesh.pipeline - 1 and sample.is_of(found, whole.model):
                return sample, found
        return sample, measured(whole.model, sample, whole.lend)


def _shared(value: Any, group: dist.ProcessGroup) -> Any:
    """The first rank's."""
    values = [value]
    dist.broadcast_object_list(values, 0, group=group)
    return values[0]


def own_stages(
    model: LongcatNext, plan: Plan, device: int, weights: LossWeights | None = None
) -> dict[int, ModelStage]:
    """The stages of one device, by number."""
    stages = split(model, plan.cuts, weights)
    return {number: stages[number] for number, home in enumerate(plan.placement) if home == device}


def _language_model(stage: Stage) -> LongcatNext:
    if not isinstance(stage.module, LongcatNext):
        raise ValueError(f"Pipelined: stage.module must be a LongcatNext, got {type(stage.module).__name__}")
    return stage.module


def _total(terms: Terms, weights: LossWeights, totals: Totals) -> Tensor:
    total = terms.total(weights, totals)
    assert total is not None  # the text unit's z-loss is always there
    return total


def _cpu(report: Report) -> Report:
    metrics = {name: (total.cpu(), count.cpu()) for name, (total, count) in report.metrics.items()}
    choices = {layer: counts.cpu() for layer, counts in report.choices.items()}
    return Report(report.terms.map(Tensor.cpu), metrics, choices)
