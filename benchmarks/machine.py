"""What a run stands on: the machine's name and state, its ceilings, and contenders in processes of their own."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import harness
from longcat_kernels import native

ROOT = Path(__file__).resolve().parent.parent
COPIED_BYTES = 1 << 28  # far beyond any cache
LARGE_PRODUCT = (8192, 8192, 8192)  # of a GPU's ceiling where a case names no product of its own
TRIES = 5
# Large blocks go back to the system when freed, so that resident memory is memory in use; it makes calls slower.
PLAIN_MALLOC = (("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "65536"))


def device_name(device: str) -> str:
    """Of the processor or the GPU, as its maker writes it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """`name` as a folder: "AMD EPYC(tm) 9755" -> "amd-epyc-tm-9755"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    code = ("--", ":/", ":(top,exclude)benchmarks/results")  # results of other ops may have just been written
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", *code).strip())
    return {
        "device": device_name(device),
        "processors": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit + ("-changed" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no git, or no repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def ceilings(device: str, threads: int) -> tuple[dict[str, float], list[str]]:
    """What bounds any contender, and what of it cannot be had here.

    "copy": bytes read and written a second by all threads. Others: operations a second of one core, by instruction, or
    of a GPU, in a large product.
    """
    found, missing = {"copy": _copy_bandwidth(device, threads)}, []
    if device == "cuda":
        found[half_gemm_name(*LARGE_PRODUCT)] = half_gemm(*LARGE_PRODUCT)
    if device == "cpu":
        for kind, isa in (("fma", "avx2"), ("fma", "avx512"), ("bf16_dot", "avx512")):
            try:
                found[f"{kind}_{isa}"] = native.module().peak(kind, isa, 1)
            except ValueError:
                missing.append(f"{kind}_{isa}: not on this CPU")
            except RuntimeError as error:
                missing.append(f"{kind}_{isa}: {error}")
    return found, missing


def half_gemm_name(rows: int, dim: int, entries: int) -> str:
    """Of the ceiling that `half_gemm` measures."""
    return f"half_gemm {rows}x{dim}x{entries}"


def half_gemm(rows: int, dim: int, entries: int) -> float:
    """Operations a second of cuBLAS at float16 [rows, dim] by [dim, entries]: what bounds a GPU's matrix products."""
    a, b = (torch.randn(n, dim, device="cuda").half() for n in (rows, entries))
    return 2 * rows * dim * entries / _seconds(lambda: torch.mm(a, b.T), "cuda", 1)


def _copy_bandwidth(device: str, threads: int) -> float:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source), device, threads)


def _seconds(call: harness.Call, device: str, threads: int) -> float:
    """Median of a few samples."""
    call()
    sample = harness.sampler(call, device=device, threads=threads, precision="highest", wall=False)
    return statistics.median(sample() for _ in range(TRIES))


class Worker:
    """One contender alone in a process, asked by lines; see worker.py. Raises RuntimeError where it cannot run.

    Args:
        folder: whose `longcat_kernels` it imports.
        more: settings of its environment.
    """

    def __init__(
        self,
        op: str,
        case: str,
        contender: str,
        device: str,
        threads: int,
        *,
        folder: Path = ROOT,
        more: Iterable[tuple[str, str]] = (),
    ) -> None:
        command = [
            sys.executable,
            str(Path(__file__).with_name("worker.py")),
            op,
            case,
            contender,
            device,
            str(threads),
        ]
        settings = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        settings.update(more)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self.process = subprocess.Popen(
            command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def ask(self, question: str) -> float:
        """The answer to "time", seconds of a call, or to "memory", MB by which the first call grows the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"ended with {self.process.returncode}: {last}")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def has_commit(ref: str) -> bool:
    """Whether the repository knows `ref`."""
    return bool(_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"))


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A built copy of the repository at a commit, for as long as the block lasts.

    Raises:
        RuntimeError: there is no such commit, or it does not build.
    """
    folder = Path(tempfile.mkdtemp(prefix="longcat-against-"))
    try:
        _must(["git", "worktree", "add", "--force", "--detach", str(folder), ref], ROOT)
        _must([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")


def _must(command: list[str], folder: Path) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
