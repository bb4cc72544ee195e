"""What `longcat schedule` prints: all schedules for one set of costs, side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longcat_model.files import make_writable
from longcat_model.pipeline import render
from longcat_model.pipeline.bounds import lower_bound
from longcat_model.pipeline.costs import Costs, uniform
from longcat_model.pipeline.ir import Placement, Schedule, compute_only, loop_placement, to_csv, v_placement
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.place import place
from longcat_model.pipeline.profile import load
from longcat_model.pipeline.schedules.free_order import differ, searched_in_any_order
from longcat_model.pipeline.schedules.linear import interleaved_1f1b, one_f_one_b, zb_h1
from longcat_model.pipeline.schedules.searched import DEFAULT, Effort, searched
from longcat_model.pipeline.schedules.v import v_half, v_min, v_zb
from longcat_model.pipeline.simulate import bubble, peak_bytes, unit_bytes
from longcat_model.pipeline.verify import verify


@dataclass(frozen=True)
class Line:
    """One schedule."""

    name: str
    schedule: Schedule
    placement: Placement
    costs: Costs
    makespan: float
    bubble: float  # share of the makespan in which the busiest device is idle
    idle: float  # the same of all devices
    peak_units: float  # most that a device holds; 1: one microbatch on 1 / devices of the model
    peak_bytes: int
    lower_bound: float  # of any schedule of this placement within this peak


def line(name: str, schedule: Schedule, placement: Placement, costs: Costs) -> Line:
    """Verifies and simulates a schedule."""
    makespan = verify(schedule, placement, costs.microbatches, costs).makespan
    peak = max(peak_bytes(schedule, costs))
    work = sum(map(costs.stage_work, range(costs.stages)))
    return Line(
        name=name,
        schedule=schedule,
        placement=placement,
        costs=costs,
        makespan=makespan,
        bubble=bubble(makespan, placement, costs),
        idle=1.0 - work / (len(schedule) * makespan) if makespan else 0.0,
        peak_units=peak / unit_bytes(costs, len(schedule)) if peak else 0.0,
        peak_bytes=peak,
        lower_bound=lower_bound(placement, costs, [peak] * len(schedule)),
    )


def one_stage_a_device(costs: Costs) -> Costs:
    """Costs of p stages, each of two of the 2p that are given, in order: what linear schedules run."""

    def joined(table: tuple) -> tuple:
        return tuple(
            tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(table[::2], table[1::2], strict=True)
        )

    return Costs(
        forward=joined(costs.forward),
        input=joined(costs.input),
        weight=joined(costs.weight),
        transfer=costs.transfer[1::2],
        saved=joined(costs.saved),
        received=costs.received[::2],
    )


def compare(
    costs: Costs, limits: Sequence[int] | None = None, effort: Effort = DEFAULT, *, any_order: bool = False
) -> list[Line]:
    """All schedules under the costs of 2p stages, the searched one last: with `any_order`, of microbatches too.

    Raises:
        ValueError: the limits are too small, or the order is free where all microbatches are alike.
    """
    devices, m = costs.stages // 2, costs.microbatches
    whole, v = one_stage_a_device(costs), v_placement(devices)
    if any_order and not differ(costs):
        raise ValueError("schedule: any-order needs a profile with lengths that differ, got all alike")
    if limits is None:
        limits = [max(peak_bytes(v_half(devices, m), costs))] * devices
    best = searched_in_any_order(costs, limits, effort) if any_order else searched(costs, limits, effort)
    return [
        line("1F1B", one_f_one_b(devices, m), loop_placement(devices), whole),
        line("interleaved 1F1B", interleaved_1f1b(devices, m), loop_placement(devices, 2), costs),
        line("ZB-H1", zb_h1(devices, m), loop_placement(devices), whole),
        line("V-ZB", v_zb(devices, m), v, costs),
        line("V-Min", v_min(devices, m), v, costs),
        line("V-Half", v_half(devices, m), v, costs),
        line("searched", best, v, costs),
    ]


def table(lines: Sequence[Line]) -> str:
    """Columns for people."""
    head = f"{'schedule':17} {'makespan':>10} {'bubble %':>9} {'idle %':>7} {'peak units':>11} {'peak bytes':>15} "
    text = [head + f"{'lower bound':>12} {'above it %':>11}"]
    for one in lines:
        above = 100 * (one.makespan / one.lower_bound - 1) if one.lower_bound else 0.0
        text.append(
            f"{one.name:17} {one.makespan:10.2f} {100 * one.bubble:9.1f} {100 * one.idle:7.1f} {one.peak_units:11.2f} "
            f"{one.peak_bytes:15,} {one.lower_bound:12.2f} {above:11.1f}"
        )
    return "\n".join(text)


EVEN = "no profile: every F, I and W takes 1, transfers nothing"


def costs_of(profile: Path | None, devices: int, microbatches: int) -> tuple[Costs, str]:
    """Costs of 2 * devices stages from a profile, and how they were placed."""
    if profile is None:
        return uniform(2 * devices, microbatches), EVEN
    placed = place(load(profile), devices, microbatches)
    counts, head = placed.split.layers, placed.split.head
    said = [
        "placement: layers of each stage, in V order: " + " ".join(map(str, counts)),
        f"embedding: stage 0; text head: stage {head}, device {min(head, 2 * devices - 1 - head)}; "
        f"modality losses: stage {2 * devices - 1}, device 0",
        f"V-Half {placed.makespan:.2f}, at least {placed.lower_bound:.2f} however it is placed: gap "
        f"{100 * placed.gap:.1f} %",
    ]
    return placed.costs, "\n".join(said)


def ready(out: Path) -> None:
    """Makes sure that `write` can write, before a search that takes long.

    Raises:
        ValueError: the directory cannot be made or written to.
        ModuleNotFoundError: matplotlib is not there.
    """
    import matplotlib  # noqa: F401

    make_writable(out, "schedule")


def write(found: Sequence[Line], out: Path) -> list[Path]:
    """Writes a picture of V-Half and the searched schedule; of the latter a grid of text, a trace and CSV.

    All files or none: they are made beside their places and then renamed.
    """
    best = found[-1]
    shown = [(f"{one.name}: bubble {100 * one.bubble:.1f} %", one.schedule, one.placement, one.costs) for one in found]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        made = Path(folder)
        for name in ("timeline.png", "timeline.svg"):
            render.picture(shown[-2:], made / name)
        lowered = lower(best.schedule, best.placement, best.costs.microbatches, best.costs)
        texts = {
            "grid.txt": render.grid(best.schedule, best.placement, best.costs),
            "trace.json": json.dumps(render.chrome_trace(best.schedule, best.placement, best.costs)),
            "compute_only.csv": to_csv(compute_only(best.schedule)),
            "lowered.csv": to_csv(lowered),
        }
        for name, text in texts.items():
            (made / name).write_text(text)
        return [file.replace(out / file.name) for file in sorted(made.iterdir())]
