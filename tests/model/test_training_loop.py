"""The training loop: exact resume, only the chosen parameters move, whole files or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longcat_model.training import checkpoint
from longcat_model.training.loop import Stage, train


def make_stage(steps: int = 12, frozen: bool = False) -> Stage:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return inputs, inputs.sum(1, keepdim=True)

    def loss(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = (module(pair[0]) - pair[1]).square().mean()
        return error, {"error": error.detach()}

    parameters = tuple(module[2].parameters() if frozen else module.parameters())
    return Stage(
        name="line", module=module, parameters=parameters, batch=batch, loss=loss, steps=steps, learning_rate=1e-2
    )


class Interrupted(Exception):
    pass


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    whole = make_stage()
    want = train(whole, tmp_path / "whole", save_every=5, quiet=True)

    cut = make_stage()

    def interrupt(step: int) -> None:
        if step == 7:
            raise Interrupted

    cut_stage = Stage(**{**cut.__dict__, "after_step": interrupt})
    with pytest.raises(Interrupted):
        train(cut_stage, tmp_path / "cut", save_every=5, quiet=True)
    resumed = make_stage()
    got = train(resumed, tmp_path / "cut", save_every=5, quiet=True)

    assert got == want
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finished_stage_is_loaded_not_trained(tmp_path: Path) -> None:
    first = make_stage()
    want = train(first, tmp_path, quiet=True)
    again = make_stage()
    assert train(again, tmp_path, quiet=True) == want
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))


def test_only_the_chosen_parameters_move(tmp_path: Path) -> None:
    stage = make_stage(frozen=True)
    assert isinstance(stage.module, nn.Sequential)
    before = [p.clone() for p in stage.module.parameters()]
    train(stage, tmp_path, quiet=True)
    moved = [not torch.equal(a, b) for a, b in zip(before, stage.module.parameters(), strict=True)]
    assert moved == [False, False, True, True]


def test_refuses_a_loss_that_is_not_finite_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    stage = make_stage()
    train(stage, tmp_path, quiet=True)
    kept = (tmp_path / "line.pt").read_bytes()
    bad = make_stage(steps=20)
    broken = Stage(**{**bad.__dict__, "loss": lambda batch: (torch.tensor(float("nan")), {})})
    with pytest.raises(FloatingPointError, match="line: loss must be finite"):
        train(broken, tmp_path, quiet=True)
    assert (tmp_path / "line.pt").read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 damaged"])
def test_refuses_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "line.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"line\.pt"):
        train(make_stage(), tmp_path, quiet=True)


def test_refuses_a_checkpoint_of_another_module(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "line.pt", {"module": {"other": torch.zeros(1)}, "optimizer": {}, "step": 1})
    with pytest.raises(ValueError, match="must fit the module"):
        train(make_stage(), tmp_path, quiet=True)
