"""The command that the README gives for torchrun, as it is printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longcat_model import presets
from longcat_model.cli import RUN, main
from longcat_model.pipeline import profile
from longcat_model.system import System

ROOT = Path(__file__).parents[2]


def test_the_readmes_command_trains_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (printed,) = re.findall(r"^\.venv/bin/torchrun (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    System.create(presets.tiny()).save(RUN)
    Path("DATA.jsonl").write_text('[{"text": "good", "loss": true}]\n' * 8)
    small = ["--run", str(RUN), "--steps", "2", "--rows", "2", "--row-length", "16", "--workers", "0", "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(printed), *small, "two"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main(["train", "DATA.jsonl", *small, "one"]) == 0
    assert profile.load(Path("two/profile.json")).layers, "what was measured is there for `longcat schedule`"
    assert done.stdout == capsys.readouterr().out.replace("one", "two")
