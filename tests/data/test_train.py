"""`longcat train` on shards: resumed bit for bit with any workers, only shards that fit, nothing tokenized twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make
import pytest

from longcat_model.cli import main
from longcat_model.data import documents, tokenize
from longcat_model.data.batches import Batches
from longcat_model.data.shards import Shards
from longcat_model.files import locked
from longcat_model.sequence import Batch
from longcat_model.system import System
from longcat_model.training import finetune


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.system(tmp_path_factory.mktemp("system"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make.media(tmp_path)
    return make.jsonl(tmp_path / "data.jsonl", make.LINES * 4)


@pytest.fixture
def shards(data: Path, system: Path, tmp_path: Path) -> Path:
    assert main(["tokenize", str(data), "--run", str(system), "--out", str(tmp_path / "shards")]) == 0
    return tmp_path / "shards"


def arguments(data: Path, system: Path, out: Path, *, workers: int = 0, steps: int = 5) -> list[str]:
    sizes = ["--rows", "3", "--row-length", "96", "--steps", str(steps), "--workers", str(workers)]
    return ["train", str(data), "--run", str(system), "--out", str(out), *sizes]


class CutOff(Exception):
    pass


def test_a_resumed_run_is_bit_identical(
    shards: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers, and with one from the middle on."""
    monkeypatch.setattr(finetune, "SAVE_EVERY", 2)
    assert main(arguments(shards, system, tmp_path / "whole")) == 0
    draw: Callable[[Batches, int], Batch] = Batches.__call__

    def cut(self: Batches, step: int) -> Batch:
        if step == 3:
            raise CutOff
        return draw(self, step)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Batches, "__call__", cut)
        main(arguments(shards, system, tmp_path / "cut"))
    assert main(arguments(shards, system, tmp_path / "cut", workers=1)) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two
    found = [
        [json.loads(line) for line in (tmp_path / name / "finetune.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert [row["loss"] for row in found[0]] == [row["loss"] for row in found[1]] and len(found[0]) == 5
    assert all(row["tokens_per_s"] > 0 and row["memory_bytes"] > 1e8 for row in found[1])


def test_lines_are_tokenized_once(data: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(data, system, tmp_path / "out", steps=1)) == 0
    monkeypatch.setattr(documents, "read_image", None)
    assert main(arguments(data, system, tmp_path / "out", steps=1)) == 0


def test_media_that_changed_make_another_training(
    data: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the shards of the old ones are gone."""
    assert main(arguments(data, system, tmp_path / "out", steps=1)) == 0
    make.media(tmp_path, shade=0.5)
    assert main(arguments(data, system, tmp_path / "out", steps=1)) == 2
    assert "holds shards of what" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "data")
    assert main(arguments(data, system, tmp_path / "out", steps=1)) == 2
    assert "holds a training with other media; choose another directory" in capsys.readouterr().err


def test_two_runs_in_one_directory_are_one_too_many(
    shards: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / "lock"):
        assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 2
    assert f"{tmp_path / 'out'} is in use by another process" in capsys.readouterr().err
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 0


def test_ranks_of_torchrun_do_not_each_train_alone(
    shards: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(shards, system, tmp_path / "out")) == 2
    assert "torchrun must start 1 ranks, got 2" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_metrics_that_were_removed_or_damaged(
    shards: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 0
    (tmp_path / "out" / "finetune.jsonl").write_text('{"step": 0\n')
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 2
    assert "finetune.jsonl must be lines of JSON, got: " in capsys.readouterr().err
    (tmp_path / "out" / "finetune.jsonl").unlink()
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 0
    (tmp_path / "out" / "finetune.json").write_text("{")
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 2
    assert "finetune.json must hold JSON, got: " in capsys.readouterr().err


def test_one_of_torchruns_processes_tokenizes_and_the_others_wait(
    data: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    job = tokenize.Job.of([data], system, tokenize.Settings())
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(finetune._tokenized, job, tmp_path / "out", 0)
        assert not (tmp_path / "out").exists()
        tokenize.tokenize(job, tmp_path / "out")
        assert len(waiting.result(timeout=30)) == 20


def test_a_trained_system_trains_on_the_same_shards(shards: Path, system: Path, tmp_path: Path) -> None:
    assert main(arguments(shards, system, tmp_path / "one", steps=1)) == 0
    assert main(arguments(shards, tmp_path / "one", tmp_path / "two", steps=1)) == 0


def test_shards_that_do_not_fit_are_refused(
    shards: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = System.load(system)
    next(loaded.audio.parameters()).data += 1
    loaded.save(tmp_path / "retrained")
    for given, message in (
        (arguments(shards, tmp_path / "retrained", tmp_path / "out"), "must be made by the tokenizers of"),
        (
            [*arguments(shards, system, tmp_path / "out"), "--row-length", "20"],
            f"row_length must be at least {Shards(shards).longest}",
        ),
        (arguments(tmp_path, system, tmp_path / "out"), "must hold whole shards (run `longcat tokenize`"),
        (arguments(shards, system, tmp_path / "out", workers=-1), "workers at least 0, got -1"),
    ):
        capsys.readouterr()
        assert main(given) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_shards_are_another_training(
    shards: Path, data: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(shards, system, tmp_path / "out", steps=1)) == 0
    other = ["tokenize", str(data), "--seed", "1", "--run", str(system), "--out", str(tmp_path / "other")]
    assert main(other) == 0
    assert main(arguments(tmp_path / "other", system, tmp_path / "out", steps=1)) == 2
    assert "holds a training with other documents; choose another directory with --out" in capsys.readouterr().err
