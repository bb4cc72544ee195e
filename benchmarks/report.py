"""Results for people: a table on the terminal, a plot of a results file, RESULTS.md of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Row
from parts import section

Document = dict[str, Any]

HEADER = ("contender", "time", "by ours", "GFLOP/s", "GB/s", "of ceiling", "extra MB", "wrong codes")
OPTIONAL = {  # columns where a row has something
    "error": ("error", "{:.1e}"),
    "saved_mb": ("saved MB", "{:.1f}"),
    "ratio_to_bound": ("by bound", "{:.2f}x"),
}
PREAMBLE = """# Benchmark results

Written by `python benchmarks/run.py --table` from the JSON files in `results/`. "by ours" is the median over rounds of
a contender's time by ours in the same round: above 1, ours is faster. "medium" marks contenders measured again with
`torch.set_float32_matmul_precision("medium")`, and "by ours" is then by "ours, medium" where there is one. The setting
lets float32 products round their operands to bfloat16; "error" tells who did: our kernels, while torch's products
without AMX stay in float32 and take oneDNN's kernels in place of MKL's, twice as fast on AMD. "of ceiling" is the
shortest time that the ceilings allow by the time taken; sizes that fit in a cache can exceed the ceiling of memory.
"extra MB" is what one call adds to resident memory.
"error" is relative, against float64 on the same inputs; "saved MB" is what forward keeps for backward besides weights.
"by bound" is the time by that of a copy of the bytes that must move: about the most that "by ours" can be.
On a GPU the ceiling of arithmetic is a float16 product by cuBLAS, of the case's size where it has one.
"""


def text(rows: Sequence[Row]) -> str:
    """The rows of one case as lines with aligned columns."""
    if not rows:
        return ""
    cells = _table([asdict(row) for row in rows])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    return "\n".join([f"\n{rows[0].op}: {rows[0].case}", *lines])


def ceiling_lines(ceilings: dict[str, float]) -> list[str]:
    """Each ceiling with its unit."""
    return [f"{name}: {value * 1e-9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in ceilings.items()]


def markdown(results: Path) -> str:
    """RESULTS.md: a section a device and op, a table a case, from all results files under `results`."""
    parts = [PREAMBLE]
    for file in sorted(results.glob("*/*.json")):
        document = json.loads(file.read_text())
        if "rows" in document:
            parts.append(_section(file, document))
        elif "parts" in document:
            parts.append(section(file, document))
    return "\n".join(parts)


SUMMARIES = {  # op: the start of its cases' names, and peers by their columns' names
    "rvq_encode": (
        "encode ",
        {
            "official-style eval": "official style",
            "vector-quantize-pytorch eval": "vector-quantize-pytorch",
            "faiss IndexFlatL2": "faiss",
            "torch.compile": "torch.compile",
            "torch mm only": "fp32 product alone",
        },
    ),
    "fused_moe": (
        "",
        {
            "eager loop": "eager loop",
            "F.grouped_mm": "F.grouped_mm",
            "transformers grouped_mm": "transformers grouped_mm",
            "transformers LongcatFlashExperts": "transformers LongcatFlash",
            "dense pair": "two dense products",
        },
    ),
}


def summary(results: Path) -> str:
    """The README's tables: how ours fares in each case of the results files that has the peers of `SUMMARIES`."""
    parts = []
    for op, (start, peers) in SUMMARIES.items():
        for file in sorted(results.glob(f"*/{op}.json")):
            document = json.loads(file.read_text())
            cases = [(case, {label(row): row for row in rows}) for case, rows in _by_case(document["rows"]).items()]
            lines = [
                _summary_line(case.removeprefix(start), known, peers)
                for case, known in cases
                if case.startswith(start) and set(peers) <= set(known)
            ]
            if not lines:
                continue
            environment = document["environment"]
            parts += [
                f"| `{op}`, one thread | time | GFLOP/s | of the ceiling | {' | '.join(peers.values())} |",
                "|---|" + "---:|" * (3 + len(peers)),
                *lines,
                f"\nOn {environment['device']} at commit `{environment['commit']}`, {environment['date']}.\n",
            ]
    return "\n".join([*parts, "A peer's column is its time divided by ours. All of it: `benchmarks/RESULTS.md`."])


def insert(readme: str, place: str, table: str) -> str:
    """The README with `table` between the marks of its place."""
    first, last = f"<!-- {place} -->\n", f"<!-- end of {place} -->"
    before, _, rest = readme.partition(first)
    return f"{before}{first}{table}\n{last}{rest.partition(last)[2]}"


def _summary_line(case: str, rows: dict[str, Document], peers: Iterable[str]) -> str:
    ours = rows["ours"]
    ratios = " | ".join(f"{rows[peer]['ratio_to_ours']:.1f}x" for peer in peers)
    speed = f"{_time(ours['median_s'])} | {ours['gflops']:.0f} | {ours['fraction_of_ceiling']:.0%}"
    return f"| {case} | {speed} | {ratios} |"


def _section(file: Path, document: Document) -> str:
    environment = document["environment"]
    parts = [
        f"## {file.stem}, {environment['device']}\n",
        f"Commit `{environment['commit']}`, {environment['date']}, torch {environment['torch']}, "
        f"{environment['threads']} thread(s) of {environment['processors']}"
        f"{', a brief run' if environment.get('brief') else ''}. "
        f"Ceilings: {', '.join(ceiling_lines(document['ceilings']))}.\n",
    ]
    if file.with_suffix(".png").exists():
        parts.append(f"![{file.stem}]({file.parent.parent.name}/{file.parent.name}/{file.stem}.png)\n")
    for case, rows in _by_case(document["rows"]).items():
        header, *cells = _table(rows)
        lines = [header, ("---", *["---:"] * (len(header) - 1)), *cells]
        parts.append(f"**{case}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _by_case(rows: Sequence[Document]) -> dict[str, list[Document]]:
    """By case, and by op too where there are several."""
    several = len({row["op"] for row in rows}) > 1
    cases: dict[str, list[Document]] = {}
    for row in rows:
        cases.setdefault(f"{row['op']}: {row['case']}" if several else row["case"], []).append(row)
    return cases


def label(row: Document) -> str:
    """Contender, and its precision where that is not torch's default."""
    return row["contender"] + ("" if row["precision"] == "highest" else f", {row['precision']}")


def _table(rows: Sequence[Document]) -> list[tuple[str, ...]]:
    """Header, then a line a row."""
    more = {key: column for key, column in OPTIONAL.items() if any(row.get(key) is not None for row in rows)}
    lines = [(*_cells(row), *(_or_dash(row.get(key), form) for key, (_, form) in more.items())) for row in rows]
    return [(*HEADER, *(name for name, _ in more.values())), *lines]


def _cells(row: Document) -> tuple[str, ...]:
    return (
        label(row),
        _time(row["median_s"]),
        f"{row['ratio_to_ours']:.2f}x",
        f"{row['gflops']:.1f}",
        f"{row['gbytes_s']:.2f}",
        _or_dash(row["fraction_of_ceiling"], "{:.0%}"),
        _or_dash(row["extra_mb"], "{:.1f}"),
        _or_dash(row["wrong_codes"], "{:.2%}"),
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _time(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def plot(file: Path) -> None:
    """Draws a results file beside it: times by ours, a panel a case, then the roofline with the run's ceilings."""
    from matplotlib.figure import Figure

    document = json.loads(file.read_text())
    cases = _by_case(document["rows"])
    heights = [1 + 0.28 * len(rows) for rows in cases.values()] + [5]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (case, rows) in zip(panels, cases.items(), strict=False):
        _bars(panel, case, rows)
    _roofline(panels[-1], document)
    environment = document["environment"]
    figure.suptitle(f"{file.stem}, {environment['device']}, commit {environment['commit']}")
    figure.savefig(file.with_suffix(".png"), dpi=80)


def _bars(panel: Any, case: str, rows: list[Document]) -> None:
    rows = sorted(rows, key=lambda row: row["ratio_to_ours"], reverse=True)
    ratios = [row["ratio_to_ours"] for row in rows]
    colors = ["tab:red" if row["contender"].startswith("ours") else "tab:gray" for row in rows]
    bars = panel.barh([label(row) for row in rows], ratios, color=colors)
    panel.bar_label(bars, [f"{row['ratio_to_ours']:.2f}x  {_time(row['median_s'])}" for row in rows], padding=3)
    panel.axvline(1, color="black", linewidth=0.8)
    for row in rows:
        if row["contender"].startswith("floor"):  # what nobody can be faster than
            panel.axvline(row["ratio_to_ours"], color="tab:blue", linewidth=0.8, linestyle="--")
    panel.set_xlim(0, 1.2 * max(ratios))
    panel.set_title(f"{case}: time by ours", loc="left", fontsize=10)


def _roofline(panel: Any, document: Document) -> None:
    """Achieved GFLOP/s of ours and of the fastest peer in each case over operations a byte, under the ceilings."""
    ceilings, rows = document["ceilings"], [row for row in document["rows"] if row["gflops"] > 0]
    if not rows:
        panel.set_axis_off()
        panel.set_title("no roofline: it computes nothing, see GB/s", loc="left", fontsize=10)
        return
    intensities = [row["gflops"] / row["gbytes_s"] for row in rows]
    low, high = min(intensities) / 4, max(intensities) * 4
    for name, top in ceilings.items():
        if name == "copy":
            continue
        ridge = top / ceilings["copy"]
        xs = [min(low, ridge / 4), ridge, max(high, ridge * 4)]
        panel.plot(xs, [min(top, x * ceilings["copy"]) * 1e-9 for x in xs], linewidth=1, label=f"ceiling: {name}")
    if len(ceilings) == 1:
        panel.plot([low, high], [x * ceilings["copy"] * 1e-9 for x in (low, high)], linewidth=1, label="ceiling: copy")
    for kind, marker, color in (("ours", "o", "tab:red"), ("peers", "x", "tab:gray")):
        own = kind == "ours"
        chosen = [row for row in rows if row["contender"].startswith("ours") == own]
        xs = [row["gflops"] / row["gbytes_s"] for row in chosen]
        panel.scatter(xs, [row["gflops"] for row in chosen], marker=marker, color=color, s=18, label=kind, zorder=3)
    panel.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="GFLOP/s")
    whose = " of one thread" if rows[0]["device"] == "cpu" else ""
    panel.set_title(f"roofline{whose}", loc="left", fontsize=10)
    panel.legend(fontsize=8)
