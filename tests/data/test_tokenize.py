"""Tokenizing: the same shards however it ran, nothing written for bad documents, other shards refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make
import pytest

from longcat_model.cli import main
from longcat_model.data import shards
from longcat_model.data.documents import Reader
from longcat_model.data.shards import Shards, read_index
from longcat_model.data.tokenize import Job, Settings, tokenize, tokenizers_digest
from longcat_model.system import System


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.system(tmp_path_factory.mktemp("system"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make.media(tmp_path)
    return make.jsonl(tmp_path / "data.jsonl", make.LINES * 4)


def job(data: Path, system: Path, *more: Path, **settings: Any) -> Job:
    return Job.of([data, *more], system, Settings(**{"shard_documents": 6, **settings}))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_workers_and_interruptions_change_nothing(
    data: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize(job(data, system), tmp_path / "whole")
    assert [len(whole), whole.index.documents] == [20, [6, 6, 6, 2]]
    tokenize(job(data, system), tmp_path / "workers", workers=1)
    assert files(tmp_path / "workers") == files(tmp_path / "whole")

    class CutOff(Exception):
        pass

    def cut(directory: Path, number: int, documents: Sequence[shards.Columns]) -> None:
        if number == 2:
            raise CutOff
        write_shard(directory, number, documents)

    write_shard = shards.write_shard
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(shards, "write_shard", cut)
        tokenize(job(data, system), tmp_path / "cut")
    assert set(files(tmp_path / "cut")) == {
        "index.json",
        "media.jsonl",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    with pytest.raises(ValueError, match="must hold whole shards"):
        Shards(tmp_path / "cut")
    read = []
    document = Reader.document
    monkeypatch.setattr(Reader, "document", lambda self, *rest: read.append(1) or document(self, *rest))
    tokenize(job(data, system), tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and len(read) == 8
    tokenize(job(data, system), tmp_path / "cut")
    assert len(read) == 8


def test_a_killed_run_goes_on(data: Path, system: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longcat_model", "tokenize", str(data), "--run", str(system)]
    command += ["--shard-documents", "1", "--out"]
    with subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path).glob("killed/shard*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    index = read_index(tmp_path / "killed")
    assert index is not None
    assert main([*command[3:], str(tmp_path / "killed")]) == 0
    assert main([*command[3:], str(tmp_path / "whole")]) == 0
    left = {name: content for name, content in files(tmp_path / "killed").items() if not name.endswith(".partial")}
    assert left == files(tmp_path / "whole")


def test_bad_documents_are_told_all_at_once_and_nothing_is_written(
    data: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(b'{\n\n[{"text": "good"}]\n\xff\n' + b"3\n" * 30 + b"[" * 100_000 + b"\n[]")
    arguments = ["tokenize", str(data), str(other), "--run", str(system), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    first, *lines = capsys.readouterr().err.split("longcat: ")[1].splitlines()
    assert first == "tokenize: 34 of 55 documents cannot be used:"
    assert [line.strip().split(":")[0] for line in lines[:3]] == [f"{other}, line {n}" for n in (1, 4, 5)]
    assert len(lines) == 21 and lines[-1].strip() == "and 14 more"
    assert not (tmp_path / "out").exists()


def test_other_shards_are_refused(data: Path, system: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(job(data, system), out)
    before = files(out)
    another = make.jsonl(tmp_path / "another.jsonl", make.LINES)
    loaded = System.load(system)
    next(loaded.vision.parameters()).data += 1
    loaded.save(tmp_path / "retrained")
    for made, what in (
        (job(another, system), "documents"),
        (job(data, system, another), "documents"),
        (job(data, tmp_path / "retrained"), "tokenizers"),
        (job(data, system, seed=1), "seed"),
        (job(data, system, longest=99), "longest"),
    ):
        with pytest.raises(ValueError, match=f"holds shards of other {what}; choose another directory"):
            tokenize(made, out)
    data.write_text(data.read_text().replace("hello", "hullo"))
    with pytest.raises(ValueError, match="holds shards of other documents"):
        tokenize(job(data, system), out)
    assert files(out) == before
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no index of them"):
        tokenize(job(another, system), out)


@pytest.mark.parametrize("name", ["a.png", "a.wav"])
@pytest.mark.parametrize("longer", [False, True])
def test_media_that_changed_behind_the_same_lines_are_noticed(
    name: str, longer: bool, data: Path, system: Path, tmp_path: Path
) -> None:
    """By what they hold: a copy of the same, or none any longer, is no change."""
    out, file = tmp_path / "out", tmp_path / name
    tokenize(job(data, system), out)
    before, content = files(out), file.read_bytes()
    file.unlink()
    tokenize(job(data, system), out)
    file.write_bytes(content)
    tokenize(job(data, system), out)
    file.write_bytes(content + b"\0" if longer else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"holds shards of what .*{name} was before; choose another directory"):
        tokenize(job(data, system), out)
    assert files(out) == before


def test_shards_of_other_media_are_others(data: Path, system: Path, tmp_path: Path) -> None:
    one = tokenize(job(data, system), tmp_path / "one").index
    make.media(tmp_path / "media", shade=0.5)
    (tmp_path / "media" / "a.png").replace(tmp_path / "a.png")
    two = tokenize(job(data, system), tmp_path / "two").index
    assert one.digest != two.digest and job(data, system).made_from.items() <= two.made_from.items()


def test_shards_outlive_the_language_model(system: Path, tmp_path: Path) -> None:
    """Only what makes ids counts: a system that was trained further reads the same shards."""
    loaded = System.load(system)
    loaded.model.lm_head.weight.data += 1
    loaded.save(tmp_path)
    assert tokenizers_digest(tmp_path) == tokenizers_digest(system)


def test_speech_to_learn_lags_at_random(data: Path, system: Path, tmp_path: Path) -> None:
    spoken = make.jsonl(data.with_name("spoken.jsonl"), [[{"say": "a.wav", "transcript": "abc"}]] * 12)
    made = tokenize(job(spoken, system), tmp_path / "out")
    begins = [int((made[number].inputs.marker >= 0).nonzero()) - 1 for number in range(12)]
    assert min(begins) == 1 and max(begins) > 1


def test_a_file_that_changes_meanwhile_is_told_and_a_rerun_goes_on(
    data: Path, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = (tmp_path / "a.png").read_bytes()
    of = Reader.of

    def spoil(*arguments: Any) -> Reader:
        (tmp_path / "a.png").write_bytes(b"")
        return of(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"changed meanwhile: .*data\.jsonl, line 2: im"),
    ):
        patch.setattr(Reader, "of", spoil)
        tokenize(job(data, system), tmp_path / "out")
    (tmp_path / "a.png").write_bytes(image)
    assert len(tokenize(job(data, system), tmp_path / "out")) == 20


def test_the_command_says_what_it_made(
    data: Path, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", str(data), "--run", str(system), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    made = Shards(tmp_path / "out")
    positions = sum(len(made[i]) for i in range(20))
    assert (
        capsys.readouterr().out
        == f"20 documents, {positions} positions, the longest {made.longest}: {made.directory}\n"
    )
    assert json.loads((tmp_path / "out/index.json").read_text())["documents"] == [20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "data must be a readable text file, got none.jsonl"),
        (["."], "data must be a readable text file, got ."),
        ([], "data must be one file or more, got none"),
        (["DATA", "--workers", "-1"], "workers must be at least 0, got -1"),
        (["DATA", "--longest", "0"], "longest and shard_documents must be at least 1"),
        (["EMPTY"], "data must hold at least one document, got none in"),
    ],
)
def test_errors_are_one_line(
    data: Path,
    system: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    filled = [a.replace("DATA", str(data)).replace("EMPTY", str(tmp_path / "empty.jsonl")) for a in arguments]
    assert main(["tokenize", *filled, "--run", str(system), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
