"""Benchmarks that are no op: a module's PARTS, each a function that gives the rows of one table.

A row is a dict of its columns; their names say the units. In a module `bench_<name>.py`
    PARTS     name of a part -> the function
    QUICK     the part that `--quick` runs
    PLOTTED   name of a part -> the column that names a bar, and the columns that are bars
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]


def run(module: ModuleType, file: Path | None, case: str, quick: bool, environment: Mapping[str, Any]) -> None:
    """Measures and prints the parts whose name contains `case`; in `file` they replace those measured before.

    Each part stands there with the environment it was measured in.
    """
    for name in [module.QUICK] if quick else [name for name in module.PARTS if case in name]:
        rows = module.PARTS[name]()
        print(f"\n{name}\n" + "\n".join(" | ".join(line) for line in cells(rows)), flush=True)
        if file is not None:
            known = json.loads(file.read_text())["parts"] if file.exists() else {}
            found = {**known, name: {"environment": dict(environment), "rows": rows}}
            save(file, {"parts": {part: found[part] for part in module.PARTS if part in found}})


def save(file: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(document, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, file)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A header and a line a row."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns, *([cell(row.get(column)) for column in columns] for row in rows)]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section(file: Path, document: Mapping[str, Any]) -> str:
    """Of RESULTS.md."""
    parts = document["parts"]
    lines = [f"## {file.stem}, {next(iter(parts.values()))['environment']['device']}\n"]
    if file.with_suffix(".png").exists():
        lines.append(f"![{file.stem}]({file.parent.parent.name}/{file.parent.name}/{file.stem}.png)\n")
    for name, part in parts.items():
        header, *rows = cells(part["rows"])
        environment = part["environment"]
        when = f"commit `{environment['commit']}`, {environment['date']}, load before {environment['load']}"
        lines.append(f"**{name}** ({when})\n")
        table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        lines.append("\n".join(f"| {' | '.join(line)} |" for line in table) + "\n")
    return "\n".join(lines)


def plot(file: Path, module: ModuleType) -> None:
    """Bars of the columns that the module names, a panel a part, beside the file."""
    from matplotlib.figure import Figure

    parts = {name: part for name, part in json.loads(file.read_text())["parts"].items() if name in module.PLOTTED}
    if not parts:
        return
    figure = Figure(figsize=(10, 2.6 * len(parts)), layout="constrained")
    for panel, (name, part) in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts.items(), strict=True):
        label, columns = module.PLOTTED[name]
        for i, column in enumerate(columns):
            places = [place + 0.8 * i / len(columns) for place in range(len(part["rows"]))]
            bars = panel.barh(places, [row[column] for row in part["rows"]], 0.75 / len(columns), label=column)
            panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        panel.set_yticks(range(len(part["rows"])), [row[label] for row in part["rows"]])
        panel.invert_yaxis()
        panel.set_title(name, loc="left", fontsize=10)
        panel.legend(fontsize=8)
    figure.savefig(file.with_suffix(".png"), dpi=80)
