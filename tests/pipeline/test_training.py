"""Training through a pipeline: the steps of one process, checkpoints that any number of ranks can go on from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from torch import nn

from longcat_model.model import LongcatNext
from longcat_model.pipeline.costs import permuted, uniform
from longcat_model.pipeline.parts import Saved
from longcat_model.pipeline.schedules.searched import Effort
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import peak_bytes, simulate
from longcat_model.pipeline.split import split
from longcat_model.pipeline.transport import InProcess
from longcat_model.sequence import Batch, pack
from longcat_model.training.balance import Balancer
from longcat_model.training.loop import CLIP_NORM, Row, Stage, train
from longcat_model.training.loss import Totals, loss
from longcat_model.training.mesh import Mesh
from longcat_model.training.microbatches import cut
from longcat_model.training.model_stages import joint, pre_align
from longcat_model.training.optim import adamw, learning_rate
from longcat_model.training.pipelined import Pipelined, train_pipelined
from longcat_model.training.plan import Piping, Plan, Sample, measured, planned
from longcat_model.training.post_validated import PostValidated
from longcat_model.training.replicas import Groups, Replicas

STEPS, RATE = 4, 1e-2
LITTLE = Effort(moves=20_000, tries=100, blocks=1, starts=2)


def batch(step: int) -> Batch:
    documents = small.documents()
    return pack([documents[(step + i) % 5] for i in range(6)], 30)


def make(model: LongcatNext, steps: int = STEPS) -> Stage:
    return joint(model, batch, steps=steps, learning_rate=RATE, weights=small.WEIGHTS)


def piped(directory: Path, devices: int, stage: Stage, save_every: int = 200) -> list[list[Row]]:
    """Trains with devices that are threads; every device begins with a copy of its own."""
    ends = InProcess.connect(devices)
    (directory / "weights.pt").parent.mkdir(parents=True, exist_ok=True)
    torch.save(stage.module.state_dict(), directory / "weights.pt")

    def work(device: int) -> list[Row]:
        model = LongcatNext(stage.module.sizes)  # type: ignore[arg-type]
        model.load_state_dict(torch.load(directory / "weights.pt"))
        own = dataclasses.replace(make(model, stage.steps), batch=stage.batch)
        engine = Pipelined(own, plan(model, devices), ends[device], small.WEIGHTS)
        return train(own, directory, save_every=save_every, quiet=True, engine=engine)

    return small.in_threads(work, devices)


def plan(model: LongcatNext, devices: int, microbatches: int = 3) -> Plan:
    cuts = small.cuts(len(model.backbone.layers), 2 * devices)
    return Plan.of(cuts, uniform(2 * devices, microbatches, 3.0, 4.0, 2.0), LITTLE)


def accumulated(stage: Stage) -> list[float]:
    """The same steps in one process, microbatch after microbatch, written out."""
    model = stage.module
    assert isinstance(model, LongcatNext)
    optimizer, norms = adamw(stage.parameters, stage.weight_decay), []
    balancer = Balancer(model, model.sizes.backbone.experts)
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.learning_rate)
        optimizer.zero_grad()
        parts = cut(stage.batch(step), 3)
        totals = Totals.of(parts)
        for part in parts:
            loss(model, part, weights=small.WEIGHTS, balancer=balancer, totals=totals)[0].backward()
        norms.append(float(nn.utils.clip_grad_norm_(stage.parameters, CLIP_NORM)))
        optimizer.step()
        balancer.step(step)
    return norms


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_step_is_that_of_one_process(devices: int, tmp_path: Path) -> None:
    """Of four devices, one has no part of the model."""
    stage = make(small.model())
    rows, *others = piped(tmp_path, devices, stage)
    norms = accumulated(stage)
    assert [row["gradient_norm"] for row in rows] == norms
    assert all(row["loss"] == other["loss"] for found in others for row, other in zip(rows, found, strict=True))
    trained = small.saved(tmp_path / "language_joint")
    for name, tensor in stage.module.state_dict().items():
        assert torch.equal(trained[f"module.{name}"], tensor), name
    assert any(name.endswith("e_score_correction_bias") and tensor.any() for name, tensor in trained.items())
    assert [json.loads(line) for line in (tmp_path / "language_joint.jsonl").read_text().splitlines()] == rows


def test_microbatches_train_as_their_batch_does(tmp_path: Path) -> None:
    """Balance loss and biases count the global batch: three microbatches on two devices, or one in one process."""
    rows, *_ = piped(tmp_path / "two", 2, make(small.model()))
    whole = train(make(small.model()), tmp_path / "one", quiet=True)
    for name in ("loss", "gradient_norm", "balance", "router_z", "hidden_z", "text_loss", "visual_loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole], rel=1e-5), name
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-6)
    assert rows[0]["balance"] == 0 < rows[1]["balance"]
    one, two = (small.saved(tmp_path / name / "language_joint") for name in ("one", "two"))
    for name in one:
        if name.startswith("balancer.") or name.endswith("correction_bias"):
            assert torch.equal(one[name], two[name]), name
        elif name.startswith("module."):  # Adam divides: where gradients are small, rounding is a part of an update
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-2 * RATE)


def test_the_checkpoint_is_one_that_a_single_process_writes(tmp_path: Path) -> None:
    piped(tmp_path / "two", 2, make(small.model()))
    train(make(small.model()), tmp_path / "one", quiet=True)
    one, two = (small.saved(tmp_path / name / "language_joint") for name in ("one", "two"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
    assert any(name.startswith("optimizer.lm_head.weight.exp_avg") for name in two)
    loaded = small.model(seed=1)
    rows = train(make(loaded), tmp_path / "two", quiet=True)
    assert len(rows) == STEPS and torch.equal(loaded.lm_head.weight, two["module.lm_head.weight"])


class Stop(Exception):
    pass


def until(last: int, step: int) -> Batch:
    if step == last:
        raise Stop
    return batch(step)


def test_other_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Three devices take over from two, in the middle, and two from those."""
    (whole, *_) = piped(tmp_path / "whole", 2, make(small.model()))

    for devices, last in ((2, 2), (3, 3)):
        with pytest.raises(Stop):
            piped(
                tmp_path / "cut",
                devices,
                dataclasses.replace(make(small.model()), batch=partial(until, last)),
                save_every=1,
            )
    (rows, *_) = piped(tmp_path / "cut", 2, make(small.model()))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    one, two = (small.saved(tmp_path / name / "language_joint") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_gradient_that_is_not_finite_skips_the_step_everywhere(tmp_path: Path) -> None:
    ends, before, models = InProcess.connect(2), small.model().state_dict(), [small.model(), small.model()]

    def work(device: int) -> tuple[list[Row], dict[str, torch.Tensor]]:
        model = models[device]  # threads share the random state: models are made before
        stage = make(model, steps=1)
        engine = Pipelined(stage, plan(model, 2), ends[device], small.WEIGHTS)
        if device == 1:
            model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
        rows = train(stage, tmp_path / str(device), quiet=True, engine=engine)
        own = engine.tensors()
        return rows, {name: tensor for name, tensor in model.state_dict().items() if f"module.{name}" in own}

    for rows, state in small.in_threads(work, 2):
        assert not torch.isfinite(torch.tensor(rows[0]["gradient_norm"])) and rows[0]["loss"] > 0
        assert state and all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_one_process_goes_on_for_two_devices_and_they_for_it(tmp_path: Path) -> None:
    whole = train(make(small.model()), tmp_path / "whole", quiet=True)
    stage = make(small.model())
    with pytest.raises(Stop):
        piped(tmp_path / "cut", 2, dataclasses.replace(stage, batch=partial(until, 1)), save_every=1)
    with pytest.raises(Stop):
        train(dataclasses.replace(stage, batch=partial(until, 3)), tmp_path / "cut", save_every=1, quiet=True)
    rows, *_ = piped(tmp_path / "cut", 2, make(small.model()))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-6)


class Noting(Replicas):
    """Notes the gradients that it is to add up."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[dict[nn.Parameter, torch.Tensor | None]] = []

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        self.noted.append({p: None if p.grad is None else p.grad.clone() for p in parameters})


def test_gradients_are_added_up_once_and_complete_stage_by_stage() -> None:
    ends, models = InProcess.connect(2), [small.model(), small.model()]

    def work(device: int) -> tuple[Pipelined, Noting]:
        noting = Noting()
        engine = Pipelined(make(models[device]), plan(models[device], 2), ends[device], small.WEIGHTS, Groups(noting))
        engine.backward(batch(0))
        return engine, noting

    for engine, noting in small.in_threads(work, 2):
        own = set(engine.parameters().values())
        assert sum(map(len, noting.noted)) == len(own) and {p for some in noting.noted for p in some} == own
        for some in noting.noted:
            assert all(grad is None if p.grad is None else torch.equal(p.grad, grad) for p, grad in some.items())
        stages = [{p for _, p in stage.named_parameters()} for stage in engine.stages.values()]
        first, second, _ = (set(some) for some in noting.noted)
        assert any(first <= stage for stage in stages) and any(second <= stage for stage in stages)
        assert engine.model.embed_tokens.weight not in first | second, "two stages make its gradient"


def test_frozen_parts_stay(tmp_path: Path) -> None:
    ends, before, models = InProcess.connect(2), small.model().state_dict(), [small.model(), small.model()]

    def work(device: int) -> list[Row]:
        model = models[device]
        stage = pre_align(model, batch, steps=2, learning_rate=RATE)
        engine = Pipelined(stage, plan(model, 2), ends[device])
        return train(stage, tmp_path, quiet=True, engine=engine)

    small.in_threads(work, 2)
    after = small.saved(tmp_path / "language_pre_align")
    moved = {name.split(".")[0] for name in before if not torch.equal(after[f"module.{name}"], before[name])}
    assert moved == {"embed_tokens", "pre_buffer", "visual_head", "audio_head"}


def noting(folder: Path, model: LongcatNext) -> Stage:
    """The stage, with a note of how many bytes of the model the process has."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    with (folder / f"bytes.{os.getpid()}").open("a") as notes:
        print(size, file=notes)
    return joint(model, batch, steps=2, learning_rate=RATE, weights=small.WEIGHTS)


def test_processes_that_do_not_wait_train_as_threads_that_do_and_have_only_their_parts(tmp_path: Path) -> None:
    model = small.model()
    saved = Saved.of(model, tmp_path / "before.safetensors")
    make_noting = partial(noting, tmp_path)
    assert train_pipelined(
        make_noting, saved, tmp_path / "two", Mesh(2), microbatches=3, weights=small.WEIGHTS, engine=PostValidated
    )
    sizes = [[int(line) for line in file.read_text().split()] for file in tmp_path.glob("bytes.*")]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert len(sizes) == 2 and sum(size[-1] for size in sizes) == whole and all(size[-1] for size in sizes)
    assert [size[:-1] for size in sizes].count([0]) == 1, "the first rank asks for a batch before it has anything"

    (rows, *_) = piped(tmp_path / "one", 2, make(small.model(), steps=2))
    found = train(joint(model, batch, steps=2, learning_rate=RATE), tmp_path / "two", quiet=True)
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in found] == [row[name] for row in rows]
    assert all(0 <= row["bubble"] < 1 and row["tokens_per_s"] > 0 and row["memory_bytes"] > 1e8 for row in found)


def test_microbatches_are_rows_without_their_common_padding() -> None:
    whole = batch(0)
    parts = cut(whole, 3)
    assert sum(part.inputs.text.shape[0] for part in parts) == whole.inputs.text.shape[0]
    assert Totals.of(parts) == Totals.of([whole])
    for part in parts:
        assert bool((part.inputs.documents[:, -1] >= 0).any())
    assert len(cut(whole, 100)) == whole.inputs.text.shape[0]


def test_the_plan_cuts_the_model_by_a_measurement_of_it() -> None:
    model = small.model()
    sample = Sample.of([batch(0)], 8)
    found, _ = planned(measured(model, sample), sample, 2, Piping(microbatches=8), LITTLE)
    stages = split(model, found.cuts)
    assert len(stages) == 4 == len(found.placement) and found.microbatches == 8
    assert [unit for stage in stages for unit in stage.units] == list(range(len(model.backbone.layers) + 3))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.costs.forward[0][0] > 0 and found.costs.saved[0][0] > 0


def test_the_plan_is_shorter_than_v_half_within_its_memory() -> None:
    """Costs of scenario U3 of the reference results; with one microbatch there is nothing to gain, and V-Half stays."""
    costs = uniform(8, 8, 10.0, 16.0, 5.0, 1.0)
    found, half = Plan.of((1, 2, 3, 4, 5, 6, 7), costs, LITTLE), v_half(4, 8)
    assert (
        simulate(found.schedule, found.placement, costs).makespan
        < 0.98 * simulate(half, found.placement, costs).makespan
    )
    assert max(peak_bytes(found.schedule, costs)) <= max(peak_bytes(half, costs))
    alone = Plan.of((1, 2, 3), permuted(uniform(4, 8), [0]), LITTLE)
    assert alone.schedule == v_half(2, 1)


@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
def test_a_plan_serves_steps_of_fewer_microbatches(microbatches: int) -> None:
    found = Plan.of((1, 2, 3), uniform(4, 8, 10.0, 16.0, 5.0), LITTLE)
    order = found.order(microbatches)
    costs = permuted(found.costs, range(microbatches))
    half = simulate(v_half(2, microbatches), found.placement, costs).makespan
    assert order.makespan_s <= half
    assert order.bubble == pytest.approx(1 - 4 * microbatches * 31 / (2 * order.makespan_s))
    assert max(peak_bytes(order.schedule, costs)) <= max(peak_bytes(found.schedule, found.costs))


def test_batches_of_any_size_train_alike(tmp_path: Path) -> None:
    """Steps of 1, 2 and 3 microbatches, by a plan for 3."""

    def shrinking(step: int) -> Batch:
        documents = small.documents()
        return pack([documents[(step + i) % 5] for i in range(6 - 2 * step)], 30)

    stage = make(small.model(), steps=3)
    stage = dataclasses.replace(stage, batch=shrinking)
    rows, *_ = piped(tmp_path, 2, stage)
    assert [row["gradient_norm"] for row in rows] == accumulated(stage)
    assert len({row["planned_s"] for row in rows}) > 1 and all(0 <= row["planned_bubble"] < 1 for row in rows)


def test_ranks_with_other_plans_do_not_begin() -> None:
    ends, models = InProcess.connect(2), [small.model(), small.model()]

    def work(device: int) -> None:
        Pipelined(make(models[device]), plan(models[device], 2, 3 + device), ends[device])

    with pytest.raises(ValueError, match=r"all devices must have one plan, got others on \[1\]"):
        small.in_threads(work, 2)
