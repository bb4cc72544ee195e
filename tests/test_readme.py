"""The README claims what is there: its op table, its example, its numbers."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_kernels import modules
from longcat_kernels.ops import OPS
from longcat_model.demo.page import GOALS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_op_table_lists_what_exists() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (`[^|]*) \|[^|]*\|[^|]*\|$", README, re.MULTILINE))
    assert rows == {op.name: ", ".join(f"`{name}`" for name in op.impls) for op in OPS}


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OTHERS = re.compile(r"integrations import (\w+)\n")  # whose models an example takes


def test_examples_run_one_after_the_other() -> None:
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        if not OTHERS.search(example):
            exec(example, names)
    assert names["x"].grad is not None and names["codes"].shape == (4, 100, 8)


def flash() -> dict[str, Any]:
    from test_transformers import model

    return {"flash": model(), "tokens": torch.zeros(1, 5, dtype=torch.int64)}


def codec() -> dict[str, Any]:
    from test_mimi import codec

    return {"codec": codec(), "sound": torch.randn(1, 1, 24_000)}


def gen() -> dict[str, Any]:
    pytest.importorskip("moshi.models.lm", reason="moshi: pip install --no-deps moshi sentencepiece")
    from test_moshi import language_model, moshi

    made = moshi.LMGen(language_model(), use_sampling=False)
    return {"gen": made, "text_token": torch.zeros(2, dtype=torch.int64), "state": torch.randn(2, 1, 24)}


def csm_model() -> dict[str, Any]:
    from test_transformers_depth import csm_decoder

    ids = torch.zeros(2, 2, dtype=torch.int64)
    return {"csm_model": SimpleNamespace(depth_decoder=csm_decoder()), "input_ids": ids, "state": torch.randn(2, 20)}


def talker() -> dict[str, Any]:
    from test_transformers_depth import qwen_talker

    return {"talker": qwen_talker(), "hidden": torch.randn(2, 16), "first_codes": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("drop_in", "models", "result", "shape"),
    [
        ("transformers", flash, "logits", (1, 5, 50)),
        ("mimi", codec, "codes", (1, 6, 13)),
        ("moshi", gen, "drawn", (2, 6)),
        ("csm", csm_model, "frame", (2, 9)),
        ("qwen3_omni", talker, "decoding", (2, 6)),
    ],
)
def test_each_drop_in_has_an_example_that_runs(
    drop_in: str, models: Callable[[], dict[str, Any]], result: str, shape: tuple[int, ...]
) -> None:
    (example,) = (example for example in EXAMPLES if OTHERS.findall(example) == [drop_in])
    assert len([line for line in example.splitlines() if line]) <= 5
    names = models()
    try:
        with torch.no_grad():
            exec(example, names)
    finally:
        if drop_in == "transformers":
            names["transformers"].unpatch()
    found = names[result]
    assert getattr(found, "codes", found).shape == shape


def test_modules_that_are_named_are_documented() -> None:
    named = re.findall(r"`(\w+)`", README[README.index("`longcat_kernels.modules` has") :].split("\n\n")[0])
    assert set(named) <= set(modules.__all__) and len(named) >= 4
    for name in modules.__all__:
        written = getattr(modules, name).__doc__
        assert written and not written.startswith(f"{name}("), name  # the latter is a NamedTuple's own
    assert all("Example:" in getattr(modules, name).__doc__ for name in set(named) - {"ExpertParallel"})


def test_numbers_come_from_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/cpu/demo.json").read_text())
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([\d.]+ %) \|", README, re.MULTILINE))
    assert rows == {name: f"{100 * result[name]['value']:.1f} %" for name in GOALS}
    assert result["settings"]["smoke"] is False
    text = README[README.index("`make demo` wrote these numbers") : README.index("<!-- end of results -->")]
    minutes, gigabytes = sum(result["seconds"].values()) / 60, result["peak_rss_bytes"] / 1e9
    stated = [f"in {minutes:.1f} minutes", f"{gigabytes:.1f} GB", f"`{result['commit']}`"]
    for row in result["speed"]:
        shown = "{:.1f} %" if row["unit"] == "%" else "{:.0f}"
        stated += [shown.format(row["op"]), shown.format(row["definition"])]
    assert [fact for fact in stated if fact not in " ".join(text.split())] == []


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
