"""`make gpu-check` as far as a machine without a GPU can tell: its steps, its refusal, and what its scripts hold."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longcat_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu_check")


def make(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """`make gpu-check` in a folder that has no .venv."""
    for name in ("Makefile", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "gpu-check", f"PYTHON={python}"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gpu-check: it would run")
def test_without_a_gpu_it_says_so_and_make_fails(tmp_path: Path) -> None:
    run = make(tmp_path, sys.executable)
    assert run.returncode == 2
    assert "gpu-check: no GPU: torch" in run.stderr and "nothing was run" in run.stderr


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    run = make(tmp_path, f"{sys.executable} -S")
    assert run.returncode == 2 and "has no torch: make gpu-check PYTHON=..." in run.stderr


def test_with_a_gpu_it_goes_through_its_steps(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"code": "abc", "device": "GPU X", "torch": "2"}
    good, bad = (
        check.Step(name, (sys.executable, "-S", "-c", f"raise SystemExit({code})"), 9)
        for name, code in (("good", 0), ("bad", 1))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "about", lambda: about)
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    for planned, code, said in (
        ([good, bad], 1, "0 of 2 steps have passed already"),
        ([good], 0, "1 of 1 steps have passed already"),
    ):
        monkeypatch.setattr(check, "steps", lambda sanitizer, planned=planned: planned)
        assert check.main() == code
        assert said in capsys.readouterr().out
    written = json.loads((tmp_path / "results" / "gpu-x" / "check.json").read_text())
    assert written["about"] == about and written["steps"]["good"]["state"] == "passed"


def test_a_sanitizer_that_pip_installed_is_found(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The layout of nvidia-cuda-sanitizer-api 13."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(check, "TOOLKIT", tmp_path)
    package = tmp_path / "nvidia"
    found = package / "cu13" / "compute-sanitizer" / "compute-sanitizer"
    found.parent.mkdir(parents=True)
    found.write_text("")
    found.chmod(0o755)
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    for folders, expected in (([], None), ([str(package)], str(found))):
        spec.submodule_search_locations = folders
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        assert check.tool("compute-sanitizer") == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check.tool("compute-sanitizer") is None


def test_every_op_and_implementation_has_its_steps(check: ModuleType) -> None:
    planned = {step.name: step for step in check.steps("compute-sanitizer")}
    for op in OPS:
        on_gpu = [name for name in op.impls if name != "cpu"]
        assert all(f"test {op.name} {name}" in planned for name in on_gpu)
        assert ("cuda" in op.impls) == (f"memcheck {op.name}" in planned) == (f"racecheck {op.name}" in planned)
        assert set(planned[f"bench {op.name}"].needs) == {f"test {op.name} {name}" for name in on_gpu}
    names = list(planned)
    for number, step in enumerate(planned.values()):
        assert all(names.index(need) < number for need in step.needs), step.name
        assert step.seconds <= 150


def test_each_test_step_picks_the_tests_of_its_op_and_implementation(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are named on a machine with a GPU, the word after -k being taken for a part of a name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    contract = importlib.import_module("test_contract")
    names = [f"[{parameter.id}]" for parameter in contract.every(lambda spec: spec.EDGE).args[1]]
    picked: list[str] = []
    for step in check.tests():
        if "-k" in step.command:
            word = step.command[step.command.index("-k") + 1]
            op = next(op for op in OPS if step.name == f"test {op.name} {step.name.split()[-1]}")
            own = [name for name in names if word in name]
            assert len(own) == len(op.spec.EDGE) and all(name.startswith(f"[{op.name}-") for name in own)
            picked += own
    assert sorted(picked) == sorted(name for name in names if "-gpu-" in name)


def test_all_kernels_are_watched(check: ModuleType) -> None:
    sources = "".join(file.read_text() for file in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    kernels = re.findall(r"(?:LC_KERNEL\([^)]*\)|__launch_bounds__\([^)]*\)) (\w+)\(", sources)
    assert len(kernels) >= 15
    assert [name for name in kernels if not name.startswith(check.KERNELS)] == []
    options = check._sanitize("name", "sanitizer", "memcheck", "rvq_encode", needs=()).command
    assert all(f"kns={start}" in options for start in check.KERNELS)


def test_kernels_run_on_every_edge_case(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the definition in the place of the kernels, and the CPU in that of the GPU."""
    kernels = importlib.import_module("gpu_kernels")
    op = kernels.CUDA_OPS["ema_update"]
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.run_cases(op) == "no case ran"
    monkeypatch.setitem(op.impls, "cuda", op.impls["reference"])
    capsys.readouterr()
    assert kernels.run_cases(op) is None
    assert capsys.readouterr().out == "".join(f"ema_update {i}: done\n" for i in range(len(op.spec.EDGE)))


def test_a_short_training_run_learns(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = importlib.import_module("gpu_training")
    monkeypatch.setattr(training.presets, "demo", training.presets.tiny)
    settings = training.Settings(sae_steps=16, quantizer_steps=1, decoder_steps=1, refiner_steps=1, images=8)
    assert training.run("cpu", settings=settings, steps=12) is None
    assert "language_joint: loss " in capsys.readouterr().out
    flat = [{"loss": 2.0}] * 20
    assert training.wrong(flat, "stage") == "stage: the loss must fall, got 2.000 -> 2.000"


LOST = """
import torch
torch.cuda.is_initialized = lambda: True
def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_first():
    pass
def test_breaks_the_gpu():
    torch.cuda.synchronize = lost
def test_after():
    pass
torch.cuda.synchronize = lambda: None
"""


def test_a_lost_gpu_ends_a_run_of_tests_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(LOST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3, run.stdout
    assert "the GPU was lost in test_it.py::test_breaks_the_gpu: CUDA error: an illegal memory access" in run.stdout
    assert "test_after" not in run.stdout
