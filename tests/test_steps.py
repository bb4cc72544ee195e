"""The runner of long checks, on small commands: what passes, fails, hangs, is missing, interrupted and resumed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
ABOUT = {"code": "abc", "device": "GPU X", "torch": "2"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("steps")
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    return module


def step(name: str, code: str, seconds: float = 20, **more: Any) -> Any:
    return importlib.import_module("steps").Step(name, (sys.executable, "-S", "-c", code), seconds, **more)


def check(steps: ModuleType, tmp_path: Path, *planned: Any, seconds: float = 60, jobs: int = 1, **about: Any) -> Any:
    """Runs the steps, or what is left of them, with a book in `tmp_path`."""
    book = steps.Book.open(tmp_path / "check.json", ABOUT | about, [s.name for s in planned])
    steps.run(planned, book, tmp_path / "logs", root=tmp_path, seconds=seconds, jobs=jobs)
    return book


def states(tmp_path: Path) -> dict[str, str]:
    found = json.loads((tmp_path / "check.json").read_text())["steps"]
    return {name: outcome["state"] for name, outcome in found.items()}


def test_each_outcome_is_told_from_the_others(steps: ModuleType, tmp_path: Path) -> None:
    planned = (
        step("good", "print('fine')"),
        step("bad", "print('line 1'); import sys; sys.exit('the reason')"),
        step("finds a mistake", "import sys; sys.exit(9)", expected=9),
        step("finds none", "", expected=9),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", seconds=2),
        step("deaf", "import signal, time; signal.signal(2, signal.SIG_IGN)\nwhile True: time.sleep(60)", seconds=0.4),
        steps.Step("absent", ("/no/such/program",), 5),
        step("after good", "", needs=("good",)),
        step("after bad", "print('never')", needs=("good", "bad")),
    )
    book = check(steps, tmp_path, *planned)
    assert states(tmp_path) == {
        "good": "passed",
        "bad": "failed",
        "finds a mistake": "passed",
        "finds none": "failed",
        "hangs": "cut off",
        "deaf": "cut off",
        "absent": "not run",
        "after good": "passed",
        "after bad": "not run",
    }
    details = {name: outcome["detail"] for name, outcome in book.steps.items()}
    assert details["bad"] == "exit code 1\nline 1\nthe reason"
    assert details["finds none"] == "exit code 0" and details["good"] == ""
    assert details["hangs"].startswith("after 2 s\nbegun\n") and "/no/such/program" in details["absent"]
    assert details["after bad"] == "needs bad: failed" and not (tmp_path / "logs" / "after-bad.log").exists()
    assert 2 <= book.steps["hangs"]["seconds"] < 20
    assert book.about == ABOUT == json.loads((tmp_path / "check.json").read_text())["about"]


def test_what_passed_is_not_run_again_while_the_code_is_the_same(steps: ModuleType, tmp_path: Path) -> None:
    count = tmp_path / "count"
    note = f"open({str(count)!r}, 'a').write('x')"
    planned = (step("good", note), step("bad", note + "; import sys; sys.exit(1)"))
    check(steps, tmp_path, *planned)
    check(steps, tmp_path, *planned)
    assert count.read_text() == "xxx" and states(tmp_path) == {"good": "passed", "bad": "failed"}
    check(steps, tmp_path, planned[0], code="other")
    assert count.read_text() == "xxxx"
    check(steps, tmp_path, step("good", note, always=True), code="other")
    assert count.read_text() == "xxxxx"
    (tmp_path / "check.json").write_text('{"about": {"code"')
    check(steps, tmp_path, planned[0])
    assert count.read_text() == "xxxxxx"


def test_what_failed_before_waits_for_what_was_never_run(steps: ModuleType, tmp_path: Path) -> None:
    """Else a step that hangs would take the time of every run, and those after it would never come."""
    hang, note = "import time; time.sleep(60)", "open('order', 'a').write('{0}')"
    first = (step("hangs", hang, seconds=0.5), step("needs it", note.format(1), needs=("hangs",)), step("last", ""))
    check(steps, tmp_path, *first, seconds=0.3)
    assert states(tmp_path) == {"hangs": "cut off", "needs it": "not run", "last": "not run"}
    again = (step("hangs", note.format(0)), first[1], step("last", note.format(2)))
    check(steps, tmp_path, *again)
    assert (tmp_path / "order").read_text() == "201" and set(states(tmp_path).values()) == {"passed"}


def test_what_failed_is_known_until_it_is_run_again(steps: ModuleType, tmp_path: Path) -> None:
    bad = step("bad", "import sys; sys.exit('the reason')")
    check(steps, tmp_path, bad)
    book = check(steps, tmp_path, bad, seconds=-1)  # no time is left
    assert book.steps["bad"]["detail"] == "exit code 1\nthe reason" and states(tmp_path) == {"bad": "failed"}
    assert steps.Book.open(tmp_path / "check.json", ABOUT | {"code": "other"}, ["bad"]).counts() == {"not run": 1}


def test_what_a_stopped_check_has_reached_is_in_the_file(steps: ModuleType, tmp_path: Path) -> None:
    """Killed between two steps, with no time to write: the file has what was done, and names all that was not."""
    script = f"""
import signal, sys; sys.path.insert(0, {str(FOLDER)!r})
from pathlib import Path
from steps import Book, Step, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
slow = (sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)")
planned = [Step("a", (sys.executable, "-S", "-c", ""), 9), Step("b", slow, 90), Step("c", slow, 90)]
book = Book.open(Path("check.json"), {ABOUT!r}, [s.name for s in planned])
run(planned, book, Path("logs"), root=Path("."), seconds=90)
"""
    for number, detail in ((signal.SIGKILL, "not reached"), (signal.SIGINT, "interrupted")):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        log = tmp_path / "logs" / "b.log"
        while not (log.exists() and log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)
        process.send_signal(number)
        process.wait()
        found = json.loads((tmp_path / "check.json").read_text())["steps"]
        assert [found[name]["state"] for name in "abc"] == ["passed", "not run", "not run"]
        assert found["b"]["detail"] == detail
        log.unlink()


def test_a_step_takes_its_children_with_it(steps: ModuleType, tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    check(steps, tmp_path, step("parent", child))
    pid = int((tmp_path / "logs" / "parent.log").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and _lives(pid):
        time.sleep(0.02)
    assert not _lives(pid)


def test_a_killed_check_takes_its_steps_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    parent = f"{child}; import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    script = f"""
import sys; sys.path.insert(0, {str(FOLDER)!r})
from pathlib import Path
from steps import Book, Step, run
step = Step("parent", (sys.executable, "-S", "-c", {parent!r}), 90)
run([step], Book.open(Path("check.json"), {ABOUT!r}, ["parent"]), Path("logs"), root=Path("."), seconds=90)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    end, log, pids = time.monotonic() + 20, tmp_path / "logs" / "parent.log", []
    while len(pids) < 2 and time.monotonic() < end:
        pids = [int(line) for line in log.read_text().splitlines()] if log.exists() else []
        time.sleep(0.05)
    assert len(pids) == 2 and all(map(_lives, pids))
    process.kill()
    process.wait()
    while any(map(_lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(_lives, pids))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_the_whole_ends_in_time_and_says_what_was_left_out(steps: ModuleType, tmp_path: Path) -> None:
    long = "import time; time.sleep(60)"
    start = time.monotonic()
    book = check(steps, tmp_path, step("first", long), step("second", ""), seconds=0.3)
    assert time.monotonic() - start < 10
    assert states(tmp_path) == {"first": "cut off", "second": "not run"}
    assert book.steps["second"]["detail"] == "no time was left: run it again"


def test_steps_that_may_run_beside_others_do(steps: ModuleType, tmp_path: Path) -> None:
    """Two that each wait for the other's file, then one alone that must not see them run."""
    wait = (
        "import pathlib, time\npathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.02)\n"
    )
    alone = "import pathlib, sys; sys.exit(pathlib.Path('late').exists() is False)"
    late = "import pathlib, time; time.sleep(0.3); pathlib.Path('late').touch()"
    planned = (
        step("one", wait.format("one", "two"), beside=True),
        step("two", wait.format("two", "one") + late, beside=True),
        step("alone", alone),
    )
    check(steps, tmp_path, *planned, jobs=2)
    assert set(states(tmp_path).values()) == {"passed"}


def test_tests_are_counted_and_a_run_of_skips_is_no_pass(steps: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_absent(): pytest.skip('no such kernel')\n"
        "def test_stopped():\n    import os; os.kill(os.getpid(), 2)\n"
    )
    pytest_of = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_a.py", "-k")
    planned = [
        steps.Step(name, (*pytest_of, picked), 60, tests=True, beside=True)
        for name, picked in (
            ("all", "good or bad or absent"),
            ("some", "good or absent"),
            ("skips", "absent"),
            ("stopped", "good or stopped"),
        )
    ]
    book = check(steps, tmp_path, *planned, jobs=5)
    wanted = {"all": "failed", "some": "passed", "skips": "not run", "stopped": "failed"}
    assert states(tmp_path) == wanted
    assert book.steps["all"]["tests"] == {"passed": 1, "failed": ["test_bad"], "skipped": {"no such kernel": 1}}
    assert book.steps["skips"]["detail"] == "no such kernel" and book.steps["stopped"]["tests"]["passed"] == 1
    assert book.steps["stopped"]["tests"]["failed"] == []


def test_the_code_is_known_by_its_contents(steps: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    (tmp_path / "setup.py").write_text("2")
    first = steps.code_hash(tmp_path, ("a", "setup.py"))
    (tmp_path / "a" / "notes.json").write_text("results are no code")
    os.utime(tmp_path / "setup.py", (0, 0))
    assert steps.code_hash(tmp_path, ("a", "setup.py")) == first
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert steps.code_hash(tmp_path, ("a", "setup.py")) != first
