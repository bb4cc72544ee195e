"""Steps that do not wait for the gradient's norm: the bits of steps that do, whatever had to be taken back."""

from __future__ import annotations

import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

from longcat_model import presets
from longcat_model.cli import main
from longcat_model.model import LongcatNext
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import RECEIVES, SENDS, Action, Kind, counterpart, parse, v_placement
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.passes.prefix import revocable_prefix
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.split import Microbatch
from longcat_model.pipeline.transport import InProcess
from longcat_model.pipeline.validation import Norms, PostValidation, Snapshot
from longcat_model.sequence import Batch, pack
from longcat_model.system import System
from longcat_model.training import finetune, loop
from longcat_model.training.loop import Row, train
from longcat_model.training.model_stages import joint
from longcat_model.training.optim import adamw
from longcat_model.training.pipelined import Pipelined
from longcat_model.training.plan import Plan
from longcat_model.training.post_validated import PostValidated
from longcat_model.training.rates import MEASURED

STEPS, DEVICES = 4, 2


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 2), (2, 5), (4, 8), (8, 3)])
@pytest.mark.parametrize("name", small.SCHEDULES)
def test_what_may_be_done_again_is_forwards_whose_messages_stay_inside(
    name: str, devices: int, microbatches: int
) -> None:
    make, place = small.SCHEDULES[name]
    placement = place(devices)
    schedule = lower(make(devices, microbatches), placement, microbatches)
    early = [row[:end] for row, end in zip(schedule, revocable_prefix(schedule, placement), strict=True)]
    inside = {action for row in early for action in row}
    assert {action.kind for action in inside} <= {Kind.F, Kind.SEND_F, Kind.RECV_F}
    assert all(counterpart(action) in inside for action in inside if action.kind in SENDS | RECEIVES)
    assert Action(0, Kind.F, 0) in inside


def test_on_every_device_of_v_half_forwards_come_first() -> None:
    """Or there would be no time in which the norm could arrive."""
    schedule = lower(v_half(4, 8), v_placement(4), 8)
    early = [row[:end] for row, end in zip(schedule, revocable_prefix(schedule, v_placement(4)), strict=True)]
    assert [sum(action.kind is Kind.F for action in row) for row in early] == [6, 6, 6, 6]


def test_the_prefix_ends_before_a_message_that_leaves_it() -> None:
    rows = parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"
    )
    assert revocable_prefix(rows, (0, 1)) == (3, 2)  # 0SEND_F1 is received after 1B0


@pytest.mark.parametrize("rendezvous", [False, True])
@pytest.mark.parametrize("name", small.SCHEDULES)
def test_forwards_that_are_done_again_use_the_weights_of_now(name: str, rendezvous: bool) -> None:
    """The first time with other weights: no stale message and no stale gradient is left."""
    make, place = small.SCHEDULES[name]
    placement, parts = place(3), small.batches(4)
    schedule = lower(make(3, 4), placement, 4)
    ends, models = InProcess.connect(3, rendezvous=rendezvous), [small.model(seed=1) for _ in range(3)]
    right, (want, _) = small.model().state_dict(), small.piped(small.model(), schedule, placement, parts)

    def work(device: int) -> None:
        own = small.runtime(models[device], schedule, placement, ends[device])

        def stands() -> bool:
            models[device].load_state_dict(right)
            models[device].zero_grad()
            return False

        own.step(Microbatch.of(parts), stands)

    small.in_threads(work, 3)
    wanted = small.gradients(want)
    for model in models:  # a table on two devices has two parts, which are not added up here
        for key, weight in model.named_parameters():
            is_apart = key == "embed_tokens.weight" and placement[0] != placement[-1]
            assert weight.grad is None or is_apart or torch.equal(weight.grad, wanted.pop(key))
    assert wanted.keys() <= {"embed_tokens.weight"}


def test_a_snapshot_gives_every_bit_back() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    counts, optimizer = torch.tensor([1, 2]), adamw(weights, 0.1)
    optimizer.param_groups[0]["lr"] = 0.1
    snapshot = Snapshot(optimizer, weights, [counts])

    def state() -> list[Tensor]:
        found = [value for weight in weights for value in optimizer.state.get(weight, {}).values()]
        return [tensor.detach().clone() for tensor in (*weights, counts, *found)]

    for kept in (3, 9, 9):  # nothing of the optimizer is there at first
        before = state()
        assert len(before) == kept
        snapshot.take()
        for again in (True, False):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            counts += 1
            optimizer.step()
            if again:
                snapshot.restore()
                assert len(state()) == kept and all(map(torch.equal, state(), before))


def total_norm(everyone: Norms) -> Tensor:
    return torch.stack([norm for devices in everyone for norms in devices for norm in norms.values()]).norm()


def test_the_next_step_begins_before_the_norm_is_known() -> None:
    """Device 1 tells nothing of its first step until device 0 has begun with the second."""
    schedule, placement, ends = lower(v_half(2, 4), v_placement(2), 4), v_placement(2), InProcess.connect(2, 20.0)
    begun, forwards, stood = threading.Event(), [], []

    def count(microbatch: int) -> None:
        forwards.append(microbatch)
        if len(forwards) > 4:
            begun.set()

    def work(device: int) -> None:
        toys = {
            s: small.Toy(s == 3, count if s == 0 else lambda _: None) for s, d in enumerate(placement) if d == device
        }
        own, weights = Runtime(schedule, placement, toys, ends[device]), {str(s): toy.weight for s, toy in toys.items()}
        optimizer = torch.optim.AdamW(weights.values())
        steps = PostValidation(ends[device], optimizer, weights, [], total_norm)
        for step in range(2):
            own.step(range(4), lambda: not steps.is_open or steps.settle()[1])
            if (device, step) == (1, 0):
                assert begun.wait(20)
            steps.begin(1e9)
            optimizer.step()
            optimizer.zero_grad()
        stood.append(steps.settle()[1])

    small.in_threads(work, 2)
    assert stood == [True, True] and forwards == [0, 1, 2, 3] * 2


def batch(step: int) -> Batch:
    documents = small.documents()
    return pack([documents[(step + i) % 5] for i in range(6)], 30)


def plan(model: LongcatNext, devices: int) -> Plan:
    cuts = small.cuts(len(model.backbone.layers), 2 * devices)
    return Plan.of(cuts, uniform(2 * devices, 3, 3.0, 4.0, 2.0), small.EFFORT)


def trained(
    kind: type[Pipelined], directory: Path, spoilt: int = -1, devices: int = DEVICES
) -> tuple[list[Row], dict[str, Tensor]]:
    """Rows and last checkpoint of a run; in step `spoilt` a gradient of one device is not finite.

    One device alone draws random numbers in its forwards; threads share their source.
    """
    ends, models = InProcess.connect(devices), [small.model() for _ in range(devices)]
    if devices == 1:
        models[0].embed_tokens.register_forward_hook(lambda module, inputs, out: out * (1 + 0.1 * torch.rand(())))
    reached = [0] * devices

    def drawn(device: int, step: int) -> Batch:
        reached[device] = step
        return batch(step)

    stages = [
        joint(model, partial(drawn, device), steps=STEPS, learning_rate=1e-2, weights=small.WEIGHTS)
        for device, model in enumerate(models)
    ]
    shared = plan(models[0], devices)

    def work(device: int) -> list[Row]:
        engine = kind(stages[device], shared, ends[device], small.WEIGHTS)
        if "lm_head.weight" in engine.own:
            weight = models[device].lm_head.weight
            weight.register_hook(lambda grad: grad * (torch.inf if reached[device] == spoilt else 1))
        return train(stages[device], directory / str(device), save_every=2, quiet=True, engine=engine)

    (rows, *_) = small.in_threads(work, devices)
    return rows, small.saved(directory / "0" / "language_joint")


def compare(directory: Path, spoilt: int = -1, devices: int = DEVICES) -> list[float]:
    """Asserts that ranks that go on end where ranks end that wait; gives the norms of all steps."""
    rows, state = trained(Pipelined, directory / "wait", spoilt, devices)
    found_rows, found = trained(PostValidated, directory / "go", spoilt, devices)
    for row, found_row in zip(rows, found_rows, strict=True):
        assert row.keys() == found_row.keys()
        for name in row.keys() - set(MEASURED):
            both_odd = not math.isfinite(row[name]) and not math.isfinite(found_row[name])
            assert row[name] == found_row[name] or both_odd, name
    assert state.keys() == found.keys() and any(name.startswith("optimizer.") for name in state)
    assert all(torch.equal(state[name], found[name]) for name in state)
    return [row["gradient_norm"] for row in rows]


@pytest.mark.parametrize(("most", "spoilt"), [(1e9, 1), (1e-3, 0), (1e9, STEPS - 1)])
def test_training_is_that_of_ranks_that_wait(
    most: float, spoilt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no step, or every one, is clipped, but for one that is left out: the first and the last, too."""
    monkeypatch.setattr(loop, "CLIP_NORM", most)
    norms = compare(tmp_path, spoilt)
    assert [math.isfinite(norm) for norm in norms] == [step != spoilt for step in range(STEPS)]
    assert {norm > most for norm in norms if math.isfinite(norm)} == {most < 1}


def test_some_steps_are_taken_back_and_others_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one device that draws random numbers: forwards that are done again draw the same."""
    monkeypatch.setattr(loop, "CLIP_NORM", 1e9)
    most = sorted(row["gradient_norm"] for row in trained(Pipelined, tmp_path / "free", devices=1)[0])[STEPS // 2]
    monkeypatch.setattr(loop, "CLIP_NORM", most)
    clipped = [norm > most for norm in compare(tmp_path, devices=1)]
    assert any(clipped) and not all(clipped)


def test_the_command_line_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines: list[type[Pipelined]] = []

    def note(*arguments: Any, engine: type[Pipelined], **others: Any) -> bool:
        engines.append(engine)
        return False

    monkeypatch.setattr(finetune, "train_pipelined", note)
    System.create(presets.tiny()).save(tmp_path / "run")
    data = tmp_path / "data.jsonl"
    data.write_text('[{"text": "good", "loss": true}]\n' * 8)
    command = ["train", str(data), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main([*command, "--pipeline", "2", "--post-validation"]) == main([*command, "--pipeline", "2"]) == 0
    assert engines == [PostValidated, Pipelined]
    assert main([*command, "--post-validation"]) == 2
    assert "train: post-validation must have several processes (--pipeline), got 1" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_training_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CLIP_NORM", 1e9)  # or step 2 is taken back, and with it what step 3 is given here
    ends, models = InProcess.connect(DEVICES), [small.model() for _ in range(DEVICES)]
    shared = plan(models[0], DEVICES)
    said: list[str] = []

    def work(device: int) -> None:
        def spoilt(step: int) -> Batch:
            if step == 3:
                models[device].backbone.norm.weight.data.fill_(torch.nan)
            return batch(step)

        stage = joint(models[device], spoilt, steps=STEPS, learning_rate=1e-2, weights=small.WEIGHTS)
        engine = PostValidated(stage, shared, ends[device], small.WEIGHTS)
        with pytest.raises(FloatingPointError, match="loss must be finite, got nan at step 3") as error:
            train(stage, tmp_path / str(device), save_every=2, quiet=True, engine=engine)
        said.append(str(error.value))

    small.in_threads(work, DEVICES)
    assert len(said) == DEVICES
    assert small.saved(tmp_path / "0" / "language_joint")["optimizer.lm_head.weight.step"] == 2
