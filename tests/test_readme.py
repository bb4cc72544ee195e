"""The README claims what is there: its op table, its example, its numbers."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

from longcat_kernels.ops import OPS
from longcat_model.demo.page import GOALS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_op_table_lists_what_exists() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (`[^|]*) \|[^|]*\|[^|]*\|$", README, re.MULTILINE))
    assert rows == {op.name: ", ".join(f"`{name}`" for name in op.impls) for op in OPS}


def test_examples_run_one_after_the_other() -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, names)
    assert names["x"].grad is not None and names["codes"].shape == (4, 100, 8)  # type: ignore[attr-defined]


def test_numbers_come_from_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/cpu/demo.json").read_text())
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([\d.]+ %) \|", README, re.MULTILINE))
    assert rows == {name: f"{100 * result[name]['value']:.1f} %" for name in GOALS}
    assert result["settings"]["smoke"] is False


def test_the_benchmark_table_is_generated_from_the_committed_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    assert report.insert(README, "benchmarks", report.summary(ROOT / "benchmarks/results")) == README
    assert (ROOT / "benchmarks/RESULTS.md").read_text() == report.markdown(ROOT / "benchmarks/results")


def test_named_files_exist() -> None:
    named = re.findall(r"`((?:longcat_\w+|csrc|tests|benchmarks)/[\w./]+)`", README)
    named += re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).exists()] == []
