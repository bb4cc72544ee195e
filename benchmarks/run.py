"""Command line of the benchmarks: `python benchmarks/run.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

import harness
import machine
import op_table
import parts
import report
from worker import extra_mb

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Arguments:
    """What to measure, and how; `parse` says what each means."""

    ops: tuple[str, ...] = ()
    out: Path | None = None
    threads: int = 1
    quick: bool = False
    brief: bool = False
    tested: bool = False
    case: str = ""
    against: str | None = None
    device: str = "auto"
    table: bool = False


def parse(words: Sequence[str] | None = None) -> Arguments:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Times ops against their peers and against this machine's own ceilings, all in one run. An op's "
        "tests run first; where one fails its speed is not reported. Prints a table a case, and writes "
        "results/<device>/<op>.json and .png beside this file, unless --quick or --case leaves some out."
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="which, such as rvq_encode ema_update; all by default")
    add("--out", type=Path, metavar="FILE", help="write JSON and plot there instead, all ops in one file")
    add("--threads", type=int, default=1, help="of every contender that sets none; one is timed by processor time, "
        "several by the clock on the wall")  # fmt: skip
    add("--quick", action="store_true", help="only the first, tiny case of each op: shows that it works, nothing else")
    add("--brief", action="store_true", help="all cases, as few rounds as will do, nothing that takes long to set up")
    add("--tested", action="store_true", help="the tests have just passed: do not run them again")
    add("--case", default="", metavar="SUBSTRING", help="only cases whose name contains this")
    add("--against", metavar="GIT_REF", help="also build the repository at this commit, and run its version of ours "
        "as a contender in the same rounds")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU where torch has one")
    add("--table", action="store_true", help="only write RESULTS.md, and the README's tables, from what is in results/")
    found = vars(parser.parse_args(words))
    return Arguments(**{**found, "ops": tuple(found["ops"])})


def main(arguments: Arguments) -> int:
    """Gives the exit code: 1 where an op is red or wrong, 2 where the arguments are."""
    if arguments.table:
        (HERE / "RESULTS.md").write_text(report.markdown(RESULTS))
        readme = HERE.parent / "README.md"
        text = report.insert(readme.read_text(), "benchmarks", report.summary(RESULTS))
        readme.write_text(report.insert(text, "ops", op_table.table(text, RESULTS)))
        return 0
    known = sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))
    unknown = set(arguments.ops) - set(known)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if unknown or arguments.threads < 1:
        rule = f"there are benchmarks of {', '.join(known)}; threads are at least 1"
        print(f"run.py: {rule}", file=sys.stderr)
        return 2
    if arguments.against is not None and not machine.has_commit(arguments.against):
        print(f"run.py: --against must name a commit of this repository, got {arguments.against!r}", file=sys.stderr)
        return 2
    modules = {op: importlib.import_module(f"bench_{op}") for op in arguments.ops or known}
    red = [op for op, module in modules.items() if not (arguments.tested or tests_pass(op, module))]
    for op in red:
        print(f"{op}: its tests fail, so its speed is not reported", file=sys.stderr)
    green = {op: module for op, module in modules.items() if op not in red}
    try:
        for op in [op for op, module in green.items() if hasattr(module, "PARTS")]:
            measure_parts(op, green.pop(op), arguments)
        compare(green, arguments, device)
    except (harness.WrongResult, RuntimeError, ChildProcessError) as error:
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
    environment = machine.environment(device, arguments.threads) | ({"brief": True} if arguments.brief else {})
    rows = []
    with contextlib.ExitStack() as stack:
        older = stack.enter_context(machine.checkout(arguments.against)) if arguments.against else None
        ceilings, missing = machine.ceilings(device, arguments.threads)
        for line in [f"{name}: {value}" for name, value in environment.items()] + report.ceiling_lines(ceilings):
            print(line)
        print(*missing, sep="\n", end="\n" if missing else "")
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
    if arguments.out is not None and rows:
        harness.save(arguments.out, environment, ceilings, rows)
        report.plot(arguments.out)


def tests_pass(op: str, module: ModuleType) -> bool:
    """Runs the op's contract tests and its own, or the module's TESTS; their report goes to the terminal."""
    own = sorted(str(file.relative_to(machine.ROOT)) for file in machine.ROOT.glob(f"tests/test_{op}*.py"))
    selected = ["tests/test_contract.py", *own, "-k", op]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *getattr(module, "TESTS", selected)]
    imports = os.pathsep.join(filter(None, [str(machine.ROOT), os.getenv("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": imports, "OMP_NUM_THREADS": "1"}  # as `make test` runs them
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
    chosen = [case for case in cases if arguments.case in case.name and not (case.only_gpu and device == "cpu")]
    for case in tqdm(chosen, desc=op, unit="case", leave=False):
        own = ceilings
        if device == "cuda":  # bounded by the product of this case's size alone, where it has one
            product = case.product or machine.LARGE_PRODUCT
            name = machine.half_gemm_name(*product)
            if name not in ceilings:
                ceilings[name] = machine.half_gemm(*product)
            own = {key: ceilings[key] for key in ("copy", name)}
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

    def memory(contender: str, call: harness.Call) -> float | None:
        if arguments.quick or (arguments.brief and device == "cpu"):
            return None
        if device == "cuda":  # torch counts every byte: no process of its own is needed
            return extra_mb(call, device)
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
        brief=arguments.brief,
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
    sys.exit(main(parse()))
