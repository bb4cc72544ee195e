"""Command line of the benchmarks: `python benchmarks/run.py --help`."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

import harness
import machine
import parts
import report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Arguments:
    """Times ops against their peers and against this machine's own ceilings, all in one run.

    An op's tests run first; where one fails its speed is not reported. Prints a table a case, and writes
    results/<device>/<op>.json and .png beside this file, unless --quick or --case leaves some out.
    """

    ops: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[OP ...]")] = ()
    """Which, such as rvq_encode ema_update; all by default."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the JSON here instead, all ops in one file; no plot."""
    threads: int = 1
    """Of every contender that sets none. One is timed by processor time, several by the clock on the wall."""
    quick: bool = False
    """Only the first, tiny case of each op, a few rounds: shows that all of it works, and nothing else."""
    case: Annotated[str, tyro.conf.arg(metavar="SUBSTRING")] = ""
    """Only cases whose name contains this."""
    against: Annotated[str | None, tyro.conf.arg(metavar="GIT_REF")] = None
    """Also build the repository at this commit, and run its version of ours as a contender in the same rounds."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda")] = "auto"
    """auto: the GPU where torch has one."""
    table: bool = False
    """Only write RESULTS.md, and the table in the README, from the JSON files in results/."""


def main(arguments: Arguments) -> int:
    """Gives the exit code: 1 where an op is red or wrong, 2 where the arguments are."""
    if arguments.table:
        (HERE / "RESULTS.md").write_text(report.markdown(RESULTS))
        readme = HERE.parent / "README.md"
        readme.write_text(report.insert(readme.read_text(), report.summary(RESULTS)))
        return 0
    known = sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))
    unknown = set(arguments.ops) - set(known)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if unknown or device not in ("cpu", "cuda") or arguments.threads < 1:
        rule = f"there are benchmarks of {', '.join(known)}; devices are auto, cpu and cuda; threads are at least 1"
        print(f"run.py: {rule}", file=sys.stderr)
        return 2
    modules = {op: importlib.import_module(f"bench_{op}") for op in arguments.ops or known}
    red = [op for op, module in modules.items() if not tests_pass(op, module)]
    for op in red:
        print(f"{op}: its tests fail, so its speed is not reported", file=sys.stderr)
    green = {op: module for op, module in modules.items() if op not in red}
    try:
        for op in [op for op, module in green.items() if hasattr(module, "PARTS")]:
            measure_parts(op, green.pop(op), arguments)
        compare(green, arguments, device)
    except (harness.WrongResult, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 1 if red else 0


def measure_parts(op: str, module: ModuleType, arguments: Arguments) -> None:
    """Of a benchmark that is no op: what is measured is kept beside what was measured before."""
    environment = machine.environment("cpu", 1)
    file = arguments.out or RESULTS / machine.slug(str(environment["device"])) / f"{op}.json"
    parts.run(module, None if arguments.quick else file, arguments.case, arguments.quick, environment)
    if not arguments.quick and arguments.out is None:
        parts.plot(file, module)


def compare(modules: dict[str, ModuleType], arguments: Arguments, device: str) -> None:
    """Measures, prints and writes; raises WrongResult where an op is wrong, RuntimeError where `against` fails."""
    if not modules:
        return
    ceilings, missing = machine.ceilings(device, arguments.threads)
    environment = machine.environment(device, arguments.threads)
    for line in [f"{key}: {value}" for key, value in environment.items()] + report.ceiling_lines(ceilings) + missing:
        print(line)
    rows = []
    with contextlib.ExitStack() as stack:
        older = stack.enter_context(machine.checkout(arguments.against)) if arguments.against else None
        for op, module in modules.items():
            file = None
            if arguments.out is None and not arguments.quick and not arguments.case:
                file = RESULTS / machine.slug(str(environment["device"])) / f"{op}.json"
            found: list[harness.Row] = []
            for case_rows in bench(op, module, ceilings, arguments, device, older):
                found += case_rows
                if file is not None:  # what is measured is kept, whatever comes
                    harness.save(file, environment, ceilings, found)
            rows += found
            if file is not None:
                report.plot(file)
                print(file)
    if arguments.out is not None:
        harness.save(arguments.out, environment, ceilings, rows)


def tests_pass(op: str, module: ModuleType) -> bool:
    """Runs the op's contract tests and its own, or the module's TESTS; their report goes to the terminal."""
    selected = ["tests/test_contract.py", f"tests/test_{op}.py", "-k", op]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *getattr(module, "TESTS", selected)]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(machine.ROOT), os.getenv("PYTHONPATH")]))}
    return subprocess.run(command, cwd=machine.ROOT, env=settings, check=False).returncode == 0


def bench(
    op: str,
    module: ModuleType,
    ceilings: dict[str, float],
    arguments: Arguments,
    device: str,
    older: Path | None = None,
) -> Iterator[list[harness.Row]]:
    """Measures the chosen cases of an op, with ours of the checkout `older` too; prints and gives each when done."""
    cases = module.CASES[:1] if arguments.quick else module.CASES
    for case in tqdm([case for case in cases if arguments.case in case.name], desc=op, unit="case", leave=False):
        own = ceilings
        if device == "cuda":  # bounded by the product of this case's size alone
            own = {"copy": ceilings["copy"]}
            if case.product is not None:
                own["half_gemm {}x{}x{}".format(*case.product)] = machine.half_gemm(*case.product)
            ceilings.update(own)
        with contextlib.ExitStack() as stack:
            found = harness.measure(op, case, own, options(op, case, arguments, device, older, stack))
        tqdm.write(report.text(found))
        yield found


def options(
    op: str,
    case: harness.Case,
    arguments: Arguments,
    device: str,
    older: Path | None,
    stack: contextlib.ExitStack,
) -> harness.Options:
    """Of a case; its processes end with `stack`."""

    def worker(contender: str, **more: Any) -> machine.Worker:
        return machine.Worker(op, case.name, contender, device, arguments.threads, **more)

    def start(contender: str, **more: Any) -> Callable[[], float]:
        started = worker(contender, **more)
        stack.callback(started.close)
        try:
            started.ask("time")
        except RuntimeError as error:
            raise harness.Skip(str(error)) from error
        return lambda: started.ask("time")

    def memory(contender: str) -> float | None:
        if arguments.quick:
            return None
        with contextlib.closing(worker(contender, more=machine.PLAIN_MALLOC)) as started:
            try:
                return started.ask("memory")
            except RuntimeError as error:
                tqdm.write(f"  {contender}: memory was not measured: {error}")
                return None

    rivals = {}
    if older is not None:
        try:
            rivals[f"ours at {arguments.against}"] = start("ours", folder=older)
        except harness.Skip as why:
            tqdm.write(f"  ours at {arguments.against}: {why}")
    return harness.Options(
        device=device,
        threads=arguments.threads,
        quick=arguments.quick,
        memory=memory,
        start=lambda contender: start(contender.name, more=contender.environment),
        rivals=rivals,
    )


def clean_environment() -> None:
    """Starts this script again without settings that slow down a contender: BLAS libraries read theirs when loaded."""
    odd = [name for name in os.environ if name.startswith(("OPENBLAS_", "MKL_", "OMP_", "GOTO_"))]
    if odd:
        settings = {name: value for name, value in os.environ.items() if name not in odd}
        os.execve(sys.executable, [sys.executable, *sys.argv], settings)


if __name__ == "__main__":
    clean_environment()
    sys.exit(main(tyro.cli(Arguments, config=(tyro.conf.FlagCreatePairsOff,))))
