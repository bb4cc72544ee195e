"""The README's table of ops: ratios by hand, GPU results from files that do not exist yet, and the committed table."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from longcat_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
README = "| op | words |\n|---|---|\n| `rvq_encode` | exact codes | old | old |\n"


@pytest.fixture
def op_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("op_table")


def row(contender: str, ratio: float, **more: Any) -> dict[str, Any]:
    found = {"op": "rvq_encode", "case": "a", "device": "cpu", "threads": 1, "precision": "highest", "wrong_codes": 0.0}
    return {**found, "contender": contender, "ratio_to_ours": ratio, **more}


def line(op_table: ModuleType, folder: Path, op: str = "rvq_encode") -> list[str]:
    table = op_table.table(README, folder)
    (found,) = (line for line in table.splitlines() if line.startswith(f"| `{op}` |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_ratios_are_those_of_the_fastest_peer_that_does_the_same_work(op_table: ModuleType, tmp_path: Path) -> None:
    case_a = [row("ours", 1.0), row("ours", 0.5, precision="medium"), row("ours, prepared", 0.1)]
    case_a += [row("torch mm only", 0.2), row("floor: weights read", 0.3), row("sloppy", 0.6, wrong_codes=0.01)]
    case_a += [row("peer", 4.0), row("peer", 2.0, precision="medium"), row("other", 3.0)]
    case_b = [row("ours", 1.0, case="b"), row("peer", 0.8, case="b"), row("dense pair", 0.1, case="b")]
    case_c = [row("ours", 1.0, case="c"), row("ours, 2 threads", 0.5, case="c", threads=2)]
    folder = tmp_path / "cpu-x"
    folder.mkdir()
    (folder / "rvq_encode.json").write_text(json.dumps({"rows": case_a + case_b}))
    (folder / "rvq_encode_threads.json").write_text(json.dumps({"rows": case_c}))
    (folder / "demo.json").write_text(json.dumps({"see_digits": {}}))
    cells = line(op_table, tmp_path)
    assert cells[1:3] == ["exact codes", "`cuda`, `triton`, `cpu`, `reference`"]
    assert cells[3:] == ["0.8x to 4.0x, median 2.4x (2 cases)", "never run"]
    assert line(op_table, tmp_path, "moe_plan")[3:] == ["not measured", "never run"]


def test_a_gpu_check_shows_what_passed_and_what_did_not(op_table: ModuleType, tmp_path: Path) -> None:
    states = {
        "test rvq_encode cuda": "passed",
        "test rvq_encode triton": "failed",
        "test rvq_encode reference": "not run",
    }
    check = {"about": {"device": "GPU X"}, "steps": {name: {"state": state} for name, state in states.items()}}
    (tmp_path / "gpu-x").mkdir()
    (tmp_path / "gpu-x" / "check.json").write_text(json.dumps(check))
    found = "GPU X: `cuda` passed, `triton` failed, `reference` not run"
    assert line(op_table, tmp_path)[3:] == ["not measured", found]
    rows = [row("ours", 1.0, device="cuda"), row("peer", 3.0, device="cuda")]
    (tmp_path / "gpu-x" / "rvq_encode.json").write_text(json.dumps({"rows": rows}))
    assert line(op_table, tmp_path)[3:] == ["not measured", f"{found}; 3.0x to 3.0x, median 3.0x (1 case)"]
    assert line(op_table, tmp_path, "moe_plan")[4] == "GPU X: not run"


def test_the_committed_table_is_the_one_of_the_committed_results(op_table: ModuleType) -> None:
    readme, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    report = importlib.import_module("report")
    assert report.insert(readme, "ops", op_table.table(readme, results)) == readme
    assert all(re.search(rf"^\| `{op.name}` \| \w[^|]+ \|", readme, re.MULTILINE) for op in OPS)
    ran = [file for file in results.glob("*/check.json") if "passed" in file.read_text()]
    assert ("Nothing has run on a GPU yet" in " ".join(readme.split())) == (not ran)
