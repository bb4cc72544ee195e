"""Schedules for the eye: a grid of text, a picture of the timeline, a trace for ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import COMPUTE, Action, Kind, Placement, Row, Schedule
from longcat_model.pipeline.simulate import Timeline, live_bytes, simulate

COLOURS = {Kind.F: "#4c72b0", Kind.I: "#dd8452", Kind.W: "#55a868", Kind.B: "#c44e52", Kind.R: "#8172b3"}
MOST_SLOTS = 10_000  # of a grid: shortest actions beside very long ones would need billions
MEANINGS = {Kind.F: "F", Kind.I: "I: input grad", Kind.W: "W: weight grad", Kind.B: "B: I and W", Kind.R: "R: F again"}


def grid(schedule: Schedule, placement: Placement, costs: Costs, columns: int | None = None) -> str:
    """One line a device, one column a slot; idle slots are dots.

    A slot is as long as the shortest action, or 1 / MOST_SLOTS of the makespan. An action is written once, in its first
    slot, and `-` in its others; times are rounded to slots, so one of nearly no duration may be left out. Of long
    schedules, the first `columns` slots.
    """
    timeline = simulate(schedule, placement, costs)
    durations = [costs.of(action) for row in schedule for action in row if action.kind in COMPUTE]
    slot = min((duration for duration in durations if duration > 0), default=1.0)
    slot = max(slot, timeline.makespan / MOST_SLOTS)
    width = max((len(str(action)) for row in schedule for action in row if action.kind in COMPUTE), default=1)
    count = round(timeline.makespan / slot)
    lines = []
    for row, starts, ends in zip(schedule, timeline.starts, timeline.ends, strict=True):
        cells = ["."] * count
        for action, start, end in zip(row, starts, ends, strict=True):
            if action.kind in COMPUTE:
                first = round(start / slot)
                for place in range(first, min(count, round(end / slot))):
                    cells[place] = str(action) if place == first else "-"
        lines.append(" ".join(cell.ljust(width) for cell in cells[:columns]).rstrip())
    return "".join(line + "\n" for line in lines)


def picture(
    schedules: Sequence[tuple[str, Schedule, Placement, Costs]],
    file: Path,
) -> None:
    """Draws timelines one below the other on one time axis, each with its title; SVG or PNG, as the name ends.

    Raises:
        ModuleNotFoundError: matplotlib is not there.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    devices = [len(schedule) for _, schedule, _, _ in schedules]
    figure = Figure(figsize=(16, sum(0.28 * count + 0.7 for count in devices) + 0.6), layout="constrained")
    axes = figure.subplots(len(schedules), 1, sharex=True, squeeze=False, height_ratios=devices)[:, 0]
    kinds = {action.kind for _, schedule, _, _ in schedules for row in schedule for action in row} & COMPUTE
    for (title, schedule, placement, costs), axis in zip(schedules, axes, strict=True):
        _draw(axis, schedule, simulate(schedule, placement, costs), len(placement) // len(schedule))
        axis.set_title(title, fontsize=9, loc="left")
    patches = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in COLOURS if kind in kinds]
    axes[-1].set_xlabel("time; pale: the device's first stage")
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), fontsize=8)
    figure.savefig(file, dpi=110)


def _draw(axis: Any, schedule: Schedule, timeline: Timeline, chunks: int) -> None:
    named = sum(map(len, schedule)) <= 1500  # more names could not be read
    for device, row in enumerate(schedule):
        first = min((action.stage for action in row), default=0)
        for action, start, end in zip(row, timeline.starts[device], timeline.ends[device], strict=True):
            if action.kind not in COMPUTE:
                continue
            pale = chunks > 1 and action.stage == first
            axis.barh(
                device,
                end - start,
                left=start,
                height=0.92,
                color=COLOURS[action.kind],
                alpha=0.55 if pale else 1.0,
                linewidth=0,
            )
            if named:
                axis.text((start + end) / 2, device, str(action.microbatch), ha="center", va="center", fontsize=5)
    axis.set_yticks(range(len(schedule)))
    axis.set_ylabel("device", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.invert_yaxis()
    axis.margins(0.002, 0.02)


def chrome_trace(schedule: Schedule, placement: Placement, costs: Costs, microseconds: float = 1.0) -> dict[str, Any]:
    """Events for ui.perfetto.dev: a process a device, its actions, and the bytes that it holds for the backward.

    `microseconds` is how long one unit of time of `costs` is.
    """
    timeline = simulate(schedule, placement, costs)
    events: list[dict[str, Any]] = []
    for device, (row, live) in enumerate(zip(schedule, live_bytes(schedule, costs), strict=True)):
        events.append(
            {"ph": "M", "name": "process_name", "pid": device, "tid": 0, "args": {"name": f"device {device}"}}
        )
        times = zip(timeline.starts[device], timeline.ends[device], strict=True)
        events += _events(row, device, [(a * microseconds, b * microseconds) for a, b in times], live)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(row: Row, device: int, times: list[tuple[float, float]], live: Sequence[int]) -> list[dict[str, Any]]:
    def event(action: Action, start: float, end: float) -> dict[str, Any]:
        shown = {"name": str(action), "cat": action.kind.value, "pid": device, "tid": 0, "ts": start}
        return {**shown, "ph": "X", "dur": end - start} if end > start else {**shown, "ph": "i", "s": "t"}

    actions = [event(action, start, end) for action, (start, end) in zip(row, times, strict=True)]
    held = [
        {"name": "saved for the backward", "ph": "C", "pid": device, "tid": 0, "ts": start, "args": {"bytes": size}}
        for (start, _), size in zip(times, live, strict=True)
    ]
    return [*actions, *held]
