"""A plugin of pytest: writes each test's outcome when it is known, so that a run that is killed loses none.

python -m pytest -p outcomes --outcomes FILE ...
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="where to write a line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            with self.file.open("a") as lines:
                lines.write(json.dumps([report.outcome, report.nodeid.split("::", 1)[-1], reason]) + "\n")


def count(file: Path) -> dict[str, Any]:
    """How many tests passed, names of those that failed, how many were skipped for each reason."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    failed = list(dict.fromkeys(name for found, name, _ in lines if found == "failed"))
    passed = {name for found, name, _ in lines if found == "passed"}
    skipped = Counter(reason for found, _, reason in lines if found == "skipped")
    return {"passed": len(passed - set(failed)), "failed": failed, "skipped": dict(skipped)}
