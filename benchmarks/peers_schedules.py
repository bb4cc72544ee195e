"""Schedules of others, as the schedules of this project: torch's from torch itself, sail-sg's V-Half by its method.

sail-sg/zero-bubble-pipeline-parallelism is no package that could be installed; what is below is written from how its
V-Half works, and gives the bubbles that its own code gave in all 16 cases of schedules.py, to the decimal known.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from longcat_model.pipeline import ir
from longcat_model.pipeline.ir import Action, Kind, Schedule
from longcat_model.pipeline.schedules.v import half_block


def torch_zbv(devices: int, microbatches: int) -> Schedule:
    """ZBVZeroBubble's order."""
    return _torch(ScheduleZBVZeroBubble, devices, microbatches)


def torch_dualpipev(devices: int, microbatches: int) -> Schedule | None:
    """DualPipeV's order, overlapped pairs one after the other as torch runs them; None for m below 2p."""
    return None if microbatches < 2 * devices else _torch(ScheduleDualPipeV, devices, microbatches)


def _torch(kind: type, devices: int, microbatches: int) -> Schedule:
    """The order that a schedule computes, without the process group that its constructor wants."""
    schedule: Any = object.__new__(kind)
    names = {"pp_group_size": devices, "n_local_stages": 2, "num_stages": 2 * devices, "_num_stages": 2 * devices}
    vars(schedule).update(names, _n_microbatches=microbatches)
    rows = (schedule._calculate_single_rank_operations(rank) for rank in range(devices))
    return ir.from_csv("".join(",".join("" if a is None else str(a) for a in row) + "\n" for row in rows))


Slots = list[list[int]]  # of one device: [F down, F up, I up, I down, and W where it has a place][microbatch]
F_DOWN, F_UP, I_UP, I_DOWN, W = range(5)


@functools.cache
def sail_v_half(devices: int, microbatches: int) -> Schedule:
    """V-Half as sail-sg makes it: the repeated block, its first and last microbatches moved into idle slots.

    Twice, with W in the first free slots: first everything before and after the steady part, then the end alone.
    """
    rows = [[list(range(start, start + 6 * microbatches, 6)) for start in _starts(row, device, devices)]
            for device, row in enumerate(half_block(devices))]  # fmt: skip
    rows = [[*row, _free_slots(row)] for row in rows]
    rows = [row[:W] for row in _squeezed(_moved(rows, microbatches, ends_only=False))]
    rows = _moved(rows, microbatches, ends_only=True)
    rows = [row[:W] for row in _squeezed([[*row, _free_slots(row)] for row in rows])]
    return tuple(_row(row, device, devices) for device, row in enumerate(rows))


def _starts(block: dict[tuple[int, Kind], int], device: int, devices: int) -> Iterable[int]:
    down, up = device, 2 * devices - 1 - device
    return (block[name] for name in ((down, Kind.F), (up, Kind.F), (up, Kind.I), (down, Kind.I)))


def _free_slots(row: Slots) -> list[int]:
    """A slot for each W: the first free one after an I, first come first served."""
    taken = {slot for slots in row[:W] for slot in slots}
    backward = set(row[I_UP]) | set(row[I_DOWN])
    waiting, slot = 0, 0
    found: list[int] = []
    while len(found) < len(backward):
        if slot in taken:
            waiting += slot in backward
        elif waiting:
            found.append(slot)
            waiting -= 1
        slot += 1
    return found


def _peak(row: Slots) -> int:
    """Activations that a device holds at most; until the last action that is not a W."""
    last = max(slots[-1] for slots in row)
    weights = row[W] if len(row) > W else [slot for slot in _free_slots(row) if slot <= last]
    change = dict.fromkeys(row[F_DOWN] + row[F_UP], 1) | dict.fromkeys(weights, -1)
    live = peak = 0
    for slot in sorted(change):
        live += change[slot]
        peak = max(peak, live)
    return peak


def _moved(rows: list[Slots], microbatches: int, ends_only: bool) -> list[Slots]:
    """Moves each action, in the order of time, to the first idle slot that what it needs and the peak allow."""
    limit = max(map(_peak, rows))
    events = sorted(
        (slot, d, t, k) for d, row in enumerate(rows) for t, slots in enumerate(row) for k, slot in enumerate(slots)
    )
    occupied: list[set[int]] = [set() for _ in rows]
    phase = 0  # before, in and after the steady part
    for slot, device, task, k in events:
        phase = max(phase, int(task == I_DOWN and device == 0))
        steady = phase == 1 or (phase == 0 and ends_only)
        if phase == 1 and task == F_DOWN and k == microbatches - 1:
            phase = 2
        rows[device][task][k] = slot
        if not steady:
            _move(rows, device, task, k, occupied[device], limit)
        occupied[device].add(rows[device][task][k])
    return rows


def _move(rows: list[Slots], device: int, task: int, k: int, occupied: set[int], limit: int) -> None:
    row = rows[device]
    latest = row[task][k]
    neighbour = device - 1 if task in (F_DOWN, I_UP) else device + 1
    needs = [-1]
    if task < W and 0 <= neighbour < len(rows):
        needs.append(rows[neighbour][task][k])
    if F_DOWN < task < W:
        needs.append(row[task - 1][k])
    if task == W:
        needs.append(sorted(row[I_UP] + row[I_DOWN])[k])
    if k:
        needs.append(row[task][k - 1])
    for slot in range(max(needs) + 1, latest):
        if slot not in occupied:
            row[task][k] = slot
            if _peak(row) <= limit:
                return
    row[task][k] = latest


def _squeezed(rows: list[Slots]) -> list[Slots]:
    """The same order, each action as early as it can be where all take one slot."""
    events = sorted(
        (slot, d, t, k) for d, row in enumerate(rows) for t, slots in enumerate(row) for k, slot in enumerate(slots)
    )
    ends: dict[tuple[int, int, int], int] = {}
    clock = [0] * len(rows)
    result: list[Slots] = [[[0] * len(slots) for slots in row] for row in rows]
    for _, device, task, k in events:
        start = clock[device]
        neighbour = device - 1 if task in (F_DOWN, I_UP) else device + 1
        if task < W:
            start = max(start, ends.get((neighbour, task, k), 0), ends.get((device, task - 1, k), 0))
        result[device][task][k] = start
        ends[device, task, k] = clock[device] = start + 1
    return result


def _row(row: Slots, device: int, devices: int) -> ir.Row:
    """Actions in the order of their slots; W goes where a slot is free, of the upper stage first."""
    down, up = device, 2 * devices - 1 - device
    names = ((down, Kind.F), (up, Kind.F), (up, Kind.I), (down, Kind.I))
    at = {slot: Action(*name, k) for name, slots in zip(names, row, strict=True) for k, slot in enumerate(slots)}
    waiting: dict[int, list[Action]] = {up: [], down: []}
    actions: list[Action] = []
    for slot in range(max(at) + 1):
        if slot in at:
            actions.append(at[slot])
            if at[slot].kind is Kind.I:
                waiting[at[slot].stage].append(at[slot]._replace(kind=Kind.W))
        elif waiting[up] or waiting[down]:
            actions.append((waiting[up] or waiting[down]).pop(0))
    return (*actions, *waiting[up], *waiting[down])
