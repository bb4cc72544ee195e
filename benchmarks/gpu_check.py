"""`make gpu-check`: everything that only a GPU can tell, in steps that a rerun goes on with.

Needs a Python with torch, triton and pytest, a C++ compiler, and nothing from the network. Builds the package in place,
runs the contract tests of every op and implementation on the GPU, compute-sanitizer on the CUDA kernels, a short
training run of the demo model and the benchmarks of the ops whose tests pass. What passed, failed and was not run
stands in results/<device>/check.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import machine
from gpu_kernels import CUDA_OPS, KERNELS
from longcat_kernels.ops import OPS
from steps import PASSED, Book, Outcome, Step, code_hash, run

ROOT = machine.ROOT
HERE = Path(__file__).resolve().parent
LOGS = ROOT / "build" / "gpu-check"
TOOLKIT = Path("/usr/local/cuda")
FOLDERS = ("csrc", "longcat_kernels", "longcat_model", "tests", "benchmarks")
CODE = ("setup.py", "pyproject.toml", "CMakeLists.txt", *FOLDERS)
ON_GPU = ("cuda", "triton", "reference")  # implementations that run there
OPTIONAL = ("moshi", "vector_quantize_pytorch", "transformers", "matplotlib", "cuda.bindings.nvrtc", "sklearn")
SECONDS = 570  # of all: below ten minutes
FOUND = 9  # exit code of compute-sanitizer where it found something
PYTHON = (sys.executable, "-u")
IMPORTS = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
APART = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor is an allocation, with an end to cross
SETTINGS = (("HF_HUB_OFFLINE", "1"), ("PYTHONPATH", IMPORTS))


def steps(sanitizer: str) -> list[Step]:
    """All of them, in order: what others need comes first."""
    build = Step("build", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 150, always=True)
    load = _script("load", "gpu_kernels.py", "load", seconds=60, needs=("build",))
    return [build, load, *tests(), *sanitized(sanitizer), training(), *benchmarks()]


def tests() -> list[Step]:
    """The contract of each op by each implementation in a process of its own, for an illegal access ends a process."""
    made = []
    for op in OPS:
        for name in (name for name in ON_GPU if name in op.impls):
            needs = ("load",) if name == "cuda" else ()  # Triton's kernels and the definitions are not built
            picked = ("tests/test_contract.py", "-k", f"[{op.name}-{name}-gpu-")
            made.append(_pytest(f"test {op.name} {name}", *picked, seconds=150, needs=needs))
    return [*made, _pytest("test device", "tests/cuda/test_cuda_device.py", seconds=120, needs=("load",))]


def sanitized(sanitizer: str) -> list[Step]:
    """Each op's CUDA kernels under both tools; first a mistake that must be found, else a pass would mean nothing."""
    planted = _sanitize("planted mistake", sanitizer, "memcheck", "planted", needs=(), expected=FOUND)
    pairs = [(checker, op) for checker in ("memcheck", "racecheck") for op in CUDA_OPS]
    needs = (planted.name, "load")
    return [planted, *(_sanitize(f"{checker} {op}", sanitizer, checker, op, needs=needs) for checker, op in pairs)]


def training() -> Step:
    return _script("train", "gpu_training.py", "cuda", seconds=90, needs=())


def benchmarks() -> list[Step]:
    """Of every op, where its tests passed on the GPU."""
    made = []
    for op in OPS:
        needs = tuple(f"test {op.name} {name}" for name in ON_GPU if name in op.impls)
        arguments = ("run.py", op.name, "--device", "cuda", "--brief", "--tested")
        seconds = 90 if op.name == "fused_moe" else 40  # a model's real sizes are among its cases
        made.append(_script(f"bench {op.name}", *arguments, seconds=seconds, needs=needs))
    return made


def _script(name: str, file: str, *arguments: str, seconds: float, needs: tuple[str, ...]) -> Step:
    return Step(name, (*PYTHON, str(HERE / file), *arguments), seconds, needs=needs, environment=SETTINGS)


def _pytest(name: str, *arguments: str, seconds: float, needs: tuple[str, ...]) -> Step:
    command = (*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    environment = (*SETTINGS, ("OMP_NUM_THREADS", "2"))
    return Step(name, command, seconds, needs=needs, environment=environment, tests=True, beside=True)


def _sanitize(name: str, sanitizer: str, checker: str, what: str, *, needs: tuple[str, ...], expected: int = 0) -> Step:
    kernels = [option for start in KERNELS for option in ("--kernel-name", f"kns={start}")]
    command = (sanitizer, "--tool", checker, "--error-exitcode", str(FOUND), *kernels)
    environment = (*SETTINGS, APART)
    script = (*PYTHON, str(HERE / "gpu_kernels.py"), what)
    return Step(name, (*command, *script), 60, expected, needs, environment, beside=True)


def about() -> dict[str, Any]:
    """What the outcomes depend on."""
    found = machine.environment("cuda", 1)
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "code": code_hash(ROOT, CODE),
        **{key: found[key] for key in ("device", "commit", "date", "python", "torch")},
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver,
        "triton": _version("triton"),
        "nvcc": _first_line("nvcc", "--version", pattern=r"release [\d.]+"),
        "compute_sanitizer": _first_line("compute-sanitizer", "--version", pattern=r"[Vv]ersion [\d.]+"),
        "missing_packages": [name for name in OPTIONAL if not _is_there(name)],
    }


def _first_line(*command: str, pattern: str = r"\S.*") -> str | None:
    """Of what a program prints, the first match; None where there is no such program."""
    program = tool(command[0])
    if program is None:
        return None
    printed = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False).stdout
    found = re.search(pattern, printed)
    return found[0] if found else None


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: on PATH, in the toolkit's own folder, or in a package of pip's."""
    wheels = importlib.util.find_spec("nvidia")
    installed = wheels.submodule_search_locations if wheels is not None else None
    roots = [TOOLKIT, *(Path(folder, "cu13") for folder in installed or ())]
    toolkit = [str(root / folder) for root in roots for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *toolkit]))


def _version(package: str) -> str | None:
    return importlib.import_module(package).__version__ if _is_there(package) else None


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def show(name: str, found: Outcome) -> None:
    """A line a step; more where it does not pass."""
    tests = found.get("tests")
    counted = f" ({tests['passed']} passed, {len(tests['failed'])} failed)" if tests else ""
    print(f"{found['state']:>8} {found['seconds']:6.1f} s  {name}{counted}", flush=True)
    if found["state"] != PASSED:
        print("\n".join(f"    {line}" for line in found["detail"].splitlines()), flush=True)


def main() -> int:
    """The exit code: 0 where all passed, 1 where not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), help="tests at once")
    parser.add_argument("--list", action="store_true", help="only print the steps, in order")
    arguments = parser.parse_args()
    planned = steps(tool("compute-sanitizer") or "compute-sanitizer")
    if arguments.list:
        print("\n".join(step.name for step in planned))
        return 0
    if not torch.cuda.is_available():
        print(f"gpu-check: no GPU: torch {torch.__version__} finds no CUDA device, so nothing was run", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    described = about()
    path = HERE / "results" / machine.slug(described["device"]) / "check.json"
    book = Book.open(path, described, [step.name for step in planned])
    for key, value in described.items():
        print(f"{key}: {value}")
    print(f"{book.counts()[PASSED]} of {len(planned)} steps have passed already", flush=True)
    try:
        run(planned, book, LOGS, root=ROOT, seconds=arguments.seconds, jobs=arguments.jobs, show=show)
    except KeyboardInterrupt:
        print("gpu-check: interrupted; run it again to go on", file=sys.stderr)
    counts = book.counts()
    print(", ".join(f"{counts[state]} {state}" for state in counts), f"of {len(planned)} steps: {path}")
    return 0 if counts[PASSED] == len(planned) else 1


if __name__ == "__main__":
    sys.exit(main())
