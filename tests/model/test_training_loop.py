"""The training loop: exact resume, only the chosen parameters move, whole files or none."""

from __future__ import annotations

import dataclasses
import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longcat_model.training import checkpoint
from longcat_model.training.checkpoint import PARTIAL, Checkpoints
from longcat_model.training.loop import Row, Stage, train
from longcat_model.training.rates import MEASURED


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


def reproducible(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in MEASURED}


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

    assert [reproducible(row) for row in got] == [reproducible(row) for row in want]
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
    kept = files(tmp_path / "line")
    bad = make_stage(steps=20)
    broken = Stage(**{**bad.__dict__, "loss": lambda batch: (torch.tensor(float("nan")), {})})
    with pytest.raises(FloatingPointError, match="line: loss must be finite"):
        train(broken, tmp_path, quiet=True)
    assert files(tmp_path / "line") == kept


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_last_checkpoint_alone_is_kept(tmp_path: Path) -> None:
    train(make_stage(), tmp_path, save_every=5, quiet=True)
    assert [path.name for path in (tmp_path / "line").iterdir()] == ["12"]


def test_what_was_written_in_part_is_forgotten(tmp_path: Path) -> None:
    """As when a run is killed while it writes: nothing of it is read, and the run goes on from the one before."""
    train(make_stage(steps=5), tmp_path, quiet=True)
    half = tmp_path / "line" / f"9{PARTIAL}"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half a ten")
    assert len(train(make_stage(steps=5), tmp_path, quiet=True)) == 5
    assert [path.name for path in (tmp_path / "line").iterdir()] == ["5"]


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing waits for a later step: were training to wait for writing, neither would end."""
    later, weights = threading.Event(), torch.zeros(3)
    write = checkpoint.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert later.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weights": weights})
        weights += 1
        assert checkpoints.latest() is None
        later.set()
    assert checkpoints.latest() == 1
    checkpoints.reader(1).read(found := {"weights": torch.ones(3)})
    assert not found["weights"].any(), "what is written is what there was at the call"


def test_a_checkpoint_that_is_there_already_stays(tmp_path: Path) -> None:
    """As when a process that was thought dead ends its writing after the restart."""
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            checkpoints.save(3, {"weights": torch.arange(3.0)})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    checkpoints.reader(3).read(found := {"weights": torch.zeros(3)})
    assert found["weights"].tolist() == [0, 1, 2]


def test_says_when_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "line").write_text("a file where the directory should be")
    with pytest.raises(ValueError, match=rf"checkpoint: .*line/12{PARTIAL} could not be written: .* Not a directory"):
        train(make_stage(), tmp_path, quiet=True)


def test_the_next_step_says_that_a_checkpoint_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before stays, and a run that is begun again goes on from it."""
    write = checkpoint.FileSystemWriter.write_data

    def full(self: Any, *args: Any) -> Any:
        if str(self.path).endswith(f"6{PARTIAL}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    stage, steps = make_stage(), []
    stage = dataclasses.replace(stage, batch=lambda step, draw=stage.batch: steps.append(step) or draw(step))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.FileSystemWriter, "write_data", full)
        patch.setattr(Checkpoints, "save", lambda *args, save=Checkpoints.save: save(*args) or args[0]._join())
        with pytest.raises(
            ValueError, match=rf"line/6{PARTIAL} could not be written: .*No space left.*before it stays"
        ):
            train(stage, tmp_path, save_every=3, quiet=True)
    assert steps == list(range(6)) and (tmp_path / "line" / "3").is_dir()
    whole = train(make_stage(), tmp_path / "whole", quiet=True)
    found = train(make_stage(), tmp_path, save_every=3, quiet=True)
    assert list(map(reproducible, found)) == list(map(reproducible, whole))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04 damaged"])
def test_refuses_a_damaged_checkpoint(tmp_path: Path, name: str, content: bytes | None) -> None:
    train(make_stage(), tmp_path, quiet=True)
    file = tmp_path / "line" / "12" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*12 must be a whole checkpoint, got: ."):
        train(make_stage(), tmp_path, quiet=True)


def test_refuses_a_checkpoint_of_another_module(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "line") as checkpoints:
        checkpoints.save(1, {"module.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must fit the module, got others of 0\.bias, 0\.weight, .*, other"):
        train(make_stage(), tmp_path, quiet=True)
