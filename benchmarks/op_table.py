"""The README's table of ops: implementations, how ours fares on the CPU, and what a GPU has said, all from files.

The words in its second column are the README's own.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longcat_kernels.ops import OPS
from longcat_kernels.spec import Op

Row = dict[str, Any]

HEADER = ("op", "what it does", "implementations", "fastest peer's time by ours, CPU", "on a GPU")
# Contenders that do less than the op: what bounds it, no peers.
BOUNDS = re.compile(r"mm only|^copy of|^floor|^dense|product alone$")
TOLERATED_WRONG = 1e-3  # share of wrong codes of a peer that does the work of one without any


def table(readme: str, results: Path) -> str:
    """A line an op, with the words that `readme` has for it."""
    words = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", readme, re.MULTILINE))
    documents = [json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))]
    rows = [row for document in documents for row in document.get("rows", ())]
    checks = [document for document in documents if "steps" in document]
    lines = [HEADER, ("---",) * len(HEADER)]
    for op in OPS:
        own = [row for row in rows if row["op"] == op.name]
        names = ", ".join(f"`{name}`" for name in op.impls)
        on_cpu = speed([row for row in own if row["device"] == "cpu"])
        lines.append((f"`{op.name}`", words.get(op.name, ""), names, on_cpu or "not measured", on_gpu(op, own, checks)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(rows: Sequence[Row]) -> str | None:
    """Over cases, the least, the median and the most of the fastest peer's time by ours; None without any."""
    ratios = [ratio for case in _cases(rows) if (ratio := _fastest_peer(case)) is not None]
    if not ratios:
        return None
    least, middle, most = (f"{ratio:.1f}x" for ratio in (min(ratios), statistics.median(ratios), max(ratios)))
    return f"{least} to {most}, median {middle} ({len(ratios)} {'case' if len(ratios) == 1 else 'cases'})"


def on_gpu(op: Op, rows: Sequence[Row], checks: Iterable[Row]) -> str:
    """What `make gpu-check` found of each implementation, by GPU, and how fast ours was there."""
    parts = []
    for check in checks:
        states = {
            name: check["steps"][step]["state"]
            for name in op.impls
            if (step := f"test {op.name} {name}") in check["steps"]
        }
        found = ", ".join(f"`{name}` {state}" for name, state in states.items()) or "not run"
        fast = speed([row for row in rows if row["device"] == "cuda"])
        parts.append(f"{check['about']['device']}: {found}" + (f"; {fast}" if fast else ""))
    return "; ".join(parts) or "never run"


def _cases(rows: Sequence[Row]) -> Iterable[list[Row]]:
    """Of one thread."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["threads"] == 1:
            cases.setdefault(row["case"], []).append(row)
    return cases.values()


def _fastest_peer(case: Sequence[Row]) -> float | None:
    """Time of the fastest peer that does the same work by that of ours, each at the faster of torch's precisions."""
    ours = min(row["ratio_to_ours"] for row in case if row["contender"] == "ours")
    exact = all(not row["wrong_codes"] for row in case if row["contender"] == "ours")
    peers = [
        row["ratio_to_ours"] / ours
        for row in case
        if not row["contender"].startswith("ours")
        and not BOUNDS.search(row["contender"])
        and not (exact and (row["wrong_codes"] or 0) > TOLERATED_WRONG)
    ]
    return min(peers, default=None)
