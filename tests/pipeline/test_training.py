"""Training through a pipeline: the steps of one process, checkpoints that any number of ranks can go on from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from torch import nn

from longcat_model.model import LongcatNext
from longcat_model.pipeline.ir import v_placement
from longcat_model.pipeline.split import split
from longcat_model.pipeline.transport import InProcess
from longcat_model.sequence import Batch, pack
from longcat_model.training import checkpoint
from longcat_model.training.balance import Balancer
from longcat_model.training.loop import CLIP_NORM, Row, Stage, train
from longcat_model.training.loss import Totals, loss
from longcat_model.training.model_stages import joint, pre_align
from longcat_model.training.optim import adamw, learning_rate
from longcat_model.training.pipelined import Pipelined, Plan, cut, train_pipelined, v_half_plan
from longcat_model.training.post_validated import PostValidated

STEPS, RATE = 4, 1e-2


def batch(step: int) -> Batch:
    documents = small.documents()
    return pack([documents[(step + i) % 5] for i in range(6)], 30)


def make(model: LongcatNext, steps: int = STEPS) -> Stage:
    return joint(model, batch, steps=steps, learning_rate=RATE, weights=small.WEIGHTS)


def piped(directory: Path, devices: int, stage: Stage, steps: int = STEPS, save_every: int = 200) -> list[list[Row]]:
    """Trains with devices that are threads, up to `steps`; every device begins with a copy of its own."""
    ends = InProcess.connect(devices)
    (directory / "weights.pt").parent.mkdir(parents=True, exist_ok=True)
    torch.save(stage.module.state_dict(), directory / "weights.pt")

    def work(device: int) -> list[Row]:
        model = LongcatNext(stage.module.sizes)  # type: ignore[arg-type]
        model.load_state_dict(torch.load(directory / "weights.pt"))
        own = Stage(**{**make(model).__dict__, "batch": stage.batch})
        engine = Pipelined(own, plan(model, devices), ends[device], small.WEIGHTS)
        return train(own, directory, save_every=save_every, quiet=True, engine=engine)

    return small.in_threads(work, devices)


def plan(model: LongcatNext, devices: int) -> Plan:
    cuts = small.cuts(len(model.backbone.layers), 2 * devices)
    return Plan(placement=v_placement(devices), cuts=cuts, microbatches=3)


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


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_every_step_is_that_of_one_process(devices: int, tmp_path: Path) -> None:
    stage = make(small.model())
    rows, *others = piped(tmp_path, devices, stage)
    norms = accumulated(stage)
    assert [row["gradient_norm"] for row in rows] == norms
    assert all(row["loss"] == other["loss"] for found in others for row, other in zip(rows, found, strict=True))
    trained = checkpoint.load(tmp_path / "language_joint.pt")["module"]
    for name, tensor in stage.module.state_dict().items():
        assert torch.equal(trained[name], tensor), name
    assert any(name.endswith("e_score_correction_bias") and tensor.any() for name, tensor in trained.items())
    assert [json.loads(line) for line in (tmp_path / "language_joint.jsonl").read_text().splitlines()] == rows


def test_the_checkpoint_is_one_that_a_single_process_writes(tmp_path: Path) -> None:
    piped(tmp_path / "two", 2, make(small.model()))
    train(make(small.model()), tmp_path / "one", quiet=True)
    one, two = (checkpoint.load(tmp_path / name / "language_joint.pt") for name in ("one", "two"))
    assert list(one["module"]) == list(two["module"]) and one["step"] == two["step"] == STEPS
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert list(one["optimizer"]["state"]) == list(two["optimizer"]["state"])
    loaded = small.model(seed=1)
    rows = train(make(loaded), tmp_path / "two", quiet=True)
    assert len(rows) == STEPS and torch.equal(loaded.lm_head.weight, two["module"]["lm_head.weight"])


class Stop(Exception):
    pass


def test_other_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Three devices take over from two, in the middle, and two from those."""
    (whole, *_) = piped(tmp_path / "whole", 2, make(small.model()))

    def until(last: int, step: int) -> Batch:
        if step == last:
            raise Stop
        return batch(step)

    for devices, last in ((2, 2), (3, 3)):
        with pytest.raises(Stop):
            piped(
                tmp_path / "cut",
                devices,
                Stage(**{**make(small.model()).__dict__, "batch": partial(until, last)}),
                save_every=1,
            )
    (rows, *_) = piped(tmp_path / "cut", 2, make(small.model()))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    one, two = (checkpoint.load(tmp_path / name / "language_joint.pt") for name in ("whole", "cut"))
    assert all(torch.equal(one["module"][name], two["module"][name]) for name in one["module"])


def test_a_gradient_that_is_not_finite_skips_the_step_everywhere(tmp_path: Path) -> None:
    ends, before, models = InProcess.connect(2), small.model().state_dict(), [small.model(), small.model()]

    def work(device: int) -> tuple[list[Row], dict[str, torch.Tensor]]:
        model = models[device]  # threads share the random state: models are made before
        stage = make(model, steps=1)
        engine = Pipelined(stage, plan(model, 2), ends[device], small.WEIGHTS)
        if device == 1:
            model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
        rows = train(stage, tmp_path / str(device), quiet=True, engine=engine)
        return rows, {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}

    for rows, state in small.in_threads(work, 2):
        assert not torch.isfinite(torch.tensor(rows[0]["gradient_norm"])) and rows[0]["loss"] > 0
        assert state and all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_frozen_parts_stay(tmp_path: Path) -> None:
    ends, before, models = InProcess.connect(2), small.model().state_dict(), [small.model(), small.model()]

    def work(device: int) -> list[Row]:
        model = models[device]
        stage = pre_align(model, batch, steps=2, learning_rate=RATE)
        engine = Pipelined(stage, plan(model, 2), ends[device])
        return train(stage, tmp_path, quiet=True, engine=engine)

    small.in_threads(work, 2)
    after = checkpoint.load(tmp_path / "language_pre_align.pt")["module"]
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"embed_tokens", "pre_buffer", "visual_head", "audio_head"}


def test_processes_that_do_not_wait_train_as_threads_that_do(tmp_path: Path) -> None:
    model = small.model()
    stage = partial(joint, model, batch, steps=2, learning_rate=RATE, weights=small.WEIGHTS)
    assert train_pipelined(stage, tmp_path / "two", 2, microbatches=3, weights=small.WEIGHTS, engine=PostValidated)
    (rows, *_) = piped(tmp_path / "one", 2, make(small.model(), steps=2))
    found = train(stage(), tmp_path / "two", quiet=True)
    assert [row["loss"] for row in found] == [row["loss"] for row in rows][:2]
    assert [row["gradient_norm"] for row in found] == [row["gradient_norm"] for row in rows][:2]
    assert all(0 <= row["bubble"] < 1 and row["tokens_per_s"] > 0 for row in found)


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
    found = v_half_plan(model, 2, batch(0))
    stages = split(model, found.cuts)
    assert len(stages) == 4 == len(found.placement) and found.microbatches == 8
    assert [unit for stage in stages for unit in stage.units] == list(range(len(model.backbone.layers) + 3))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_with_other_plans_do_not_begin() -> None:
    ends, models = InProcess.connect(2), [small.model(), small.model()]

    def work(device: int) -> None:
        own = Plan(**{**plan(models[device], 2).__dict__, "microbatches": 3 + device})
        Pipelined(make(models[device]), own, ends[device])

    with pytest.raises(ValueError, match="all ranks must have the plan"):
        small.in_threads(work, 2)
