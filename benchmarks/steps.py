"""Steps of a long check: each in a process of its own, with a budget of time, its outcome kept in one JSON file.

What passed is not run again while the code is the same: a check that was interrupted, or ran out of time, goes on where
it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import outcomes
import parts

PASSED, FAILED, CUT_OFF, NOT_RUN = "passed", "failed", "cut off", "not run"
GRACE_S = 8.0  # from the interrupt that asks a step to end until it is killed
POLL_S = 0.05
TAIL = 30  # lines of a step's output that are kept where it does not pass
SAME = ("code", "device", "torch")  # of what is said about a check: with others, what passed must pass again

Outcome = dict[str, Any]  # "state", "seconds", "detail", and "tests" of a step of pytest


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        seconds: its budget.
        expected: the exit code that means passed.
        needs: names of steps before it without whose passing it is not run.
        environment: settings on top of the process's own.
        tests: a command of pytest: its tests are counted, and without one that passed it was not run.
        beside: whether others of this kind may run at the same time.
        always: run again although it passed: what it leaves behind may be gone.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    expected: int = 0
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    tests: bool = False
    beside: bool = False
    always: bool = False


def code_hash(root: Path, folders: Iterable[str]) -> str:
    """Of all files below `folders` that are text of the project, names and contents: what an outcome stands for."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((root / folder).rglob("*")) if (root / folder).is_dir() else [root / folder]:
            if file.suffix in (".py", ".h", ".cuh", ".cpp", ".txt", ".toml", ".j2"):
                digest.update(f"{file.relative_to(root)}\0{len(content := file.read_bytes())}\0".encode() + content)
    return digest.hexdigest()[:16]


@dataclass
class Book:
    """The JSON file: `about` says what was checked, `steps` how each went; written whole after every step."""

    path: Path
    about: dict[str, Any]
    steps: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, about: dict[str, Any], names: Sequence[str]) -> Book:
        """Keeps what is known of the same code, device and torch, until it is run again."""
        kept: dict[str, Outcome] = {}
        if path.exists():
            try:
                old = json.loads(path.read_text())
                if all(old["about"].get(key) == about.get(key) for key in SAME):
                    kept = {name: step for name, step in old["steps"].items() if step["state"] != NOT_RUN}
            except (ValueError, KeyError, TypeError, AttributeError):
                print(f"{path} is damaged: starting over")
        book = cls(path, about, {name: kept.get(name, outcome(NOT_RUN, 0, "not reached")) for name in names})
        book.write()
        return book

    def note(self, name: str, found: Outcome) -> None:
        self.steps[name] = found
        self.write()

    def passed(self, name: str) -> bool:
        return bool(self.steps[name]["state"] == PASSED)

    def counts(self) -> Counter[str]:
        return Counter(step["state"] for step in self.steps.values())

    def write(self) -> None:
        parts.save(self.path, {"about": self.about, "steps": self.steps})


def outcome(state: str, seconds: float, detail: str = "", **more: Any) -> Outcome:
    return {"state": state, "seconds": round(seconds, 1), "detail": detail, **more}


def run(
    steps: Sequence[Step],
    book: Book,
    logs: Path,
    *,
    root: Path,
    seconds: float,
    jobs: int = 1,
    show: Callable[[str, Outcome], None] = lambda name, found: None,
) -> None:
    """Runs, in order, what has not passed or always runs, for at most `seconds`; up to `jobs` at once that allow it.

    What failed or was cut off in an earlier run comes last: however long it takes, the others get their turn.

    Output of step "a b" goes to `logs`/a-b.log. Interrupted, it ends the steps that run and leaves them as not run;
    killed, they end too.
    """
    end = time.monotonic() + seconds
    waiting = _tried_last([step for step in steps if step.always or not book.passed(step.name)], book)
    running: list[_Running] = []

    def note(name: str, found: Outcome) -> None:
        book.note(name, found)
        show(name, found)

    groups = _Groups()
    try:
        while waiting or running:
            for process in running[:]:
                if process.over():
                    running.remove(process)
                    groups.toggle(process)
                    note(process.step.name, process.outcome())
            while waiting and _may_start(waiting[0], running, jobs):
                step = waiting.pop(0)
                reason = _why_not(step, book, end - time.monotonic())
                if reason is not None:
                    known = book.steps[step.name]
                    note(step.name, outcome(NOT_RUN, 0, reason) if known["state"] == NOT_RUN else known)
                    continue
                try:
                    running.append(_Running(step, logs, root, min(step.seconds, end - time.monotonic())))
                except OSError as error:
                    note(step.name, outcome(NOT_RUN, 0, f"cannot be started: {error}"))
                else:
                    groups.toggle(running[-1])
            time.sleep(POLL_S)
    finally:
        for process in running:
            process.kill()
            groups.toggle(process)
            note(process.step.name, outcome(NOT_RUN, process.passed_s(), "interrupted"))
        groups.close()


def _tried_last(steps: Sequence[Step], book: Book) -> list[Step]:
    """What failed or was cut off before, and what needs it, behind all others."""
    late: list[Step] = []
    for step in steps:
        is_tried = book.steps[step.name]["state"] in (FAILED, CUT_OFF)
        if is_tried or any(other.name in step.needs for other in late):
            late.append(step)
    return [step for step in steps if step not in late] + late


def _may_start(step: Step, running: Sequence[_Running], jobs: int) -> bool:
    together = step.beside and all(process.step.beside for process in running) and len(running) < jobs
    return together and not any(process.step.name in step.needs for process in running) if running else True


def _why_not(step: Step, book: Book, left_s: float) -> str | None:
    lacking = [name for name in step.needs if not book.passed(name)]
    if lacking:
        return f"needs {lacking[0]}: {book.steps[lacking[0]]['state']}"
    return "no time was left: run it again" if left_s <= 0 else None


def _environment(step: Step) -> dict[str, str]:
    found = {**os.environ, **dict(step.environment)}
    if step.tests:  # where the plugin is
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), found.get("PYTHONPATH")]))
    return found


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Running:
    """A step's process group. Past its budget it is interrupted, as by Ctrl-C, and killed if it goes on."""

    def __init__(self, step: Step, logs: Path, root: Path, seconds: float) -> None:
        self.step, self.seconds, self.start = step, seconds, time.monotonic()
        stem = re.sub(r"\W+", "-", step.name)
        self.log, self.report = logs / f"{stem}.log", logs / f"{stem}.tests"
        self.is_cut_off = False
        logs.mkdir(parents=True, exist_ok=True)
        self.report.unlink(missing_ok=True)
        plugin = ("-p", "outcomes", "--outcomes", str(self.report.resolve())) if step.tests else ()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                (*step.command, *plugin),
                cwd=root,
                env=_environment(step),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )

    def passed_s(self) -> float:
        return time.monotonic() - self.start

    def over(self) -> bool:
        if self.process.poll() is not None:
            self._signal(signal.SIGKILL)  # what it left running
            return True
        if not self.is_cut_off and self.passed_s() > self.seconds:
            self.is_cut_off = True
            self._signal(signal.SIGINT)
        elif self.passed_s() > self.seconds + GRACE_S:
            self._signal(signal.SIGKILL)
        return False

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def outcome(self) -> Outcome:
        tests = {"tests": outcomes.count(self.report)} if self.step.tests else {}
        state, detail = FAILED, f"exit code {self.process.returncode}"
        if self.is_cut_off:
            state, detail = CUT_OFF, f"after {self.seconds:.0f} s"
        elif self.process.returncode == self.step.expected:
            state, detail = PASSED, ""
        if state == PASSED and tests and not tests["tests"]["passed"]:
            state, detail = NOT_RUN, "; ".join(tests["tests"]["skipped"]) or "no test was found"
        if state in (FAILED, CUT_OFF):
            lines = self.log.read_text(errors="replace").rstrip().splitlines()[-TAIL:]
            detail = "\n".join([detail, *lines])
        return outcome(state, self.passed_s(), detail, **tests)


_WATCH = """
import contextlib, os, signal, sys
groups = set()
for line in sys.stdin:
    groups ^= {int(line)}
for group in groups:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
"""


class _Groups:
    """The process groups that run, known to a process of its own, which kills them when this one is gone."""

    def __init__(self) -> None:
        command = (sys.executable, "-S", "-c", _WATCH)
        self.watcher = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)

    def toggle(self, process: _Running) -> None:
        """Told of each once when it has started and once when it has ended."""
        assert self.watcher.stdin is not None
        self.watcher.stdin.write(f"{process.process.pid}\n")

    def close(self) -> None:
        assert self.watcher.stdin is not None
        self.watcher.stdin.close()
        self.watcher.wait()
