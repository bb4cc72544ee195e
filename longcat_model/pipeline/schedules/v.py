"""V-Half, V-Min and V-ZB: two stages a device, down and up again, from a block of slots that repeats (v_placement).

Source: Qi et al., Pipeline Parallelism with Controllable Memory (arXiv 2405.15362). A block says in which slot each
device does F and I of its two stages for one microbatch; the next microbatch does the same 6 slots later. What a device
holds follows from the slots between F and W alone, so that a block fixes the peak memory of any number of microbatches.
In stage units (one microbatch on 1 / p of the model; 1F1B holds p), for p devices and slots of equal length:

    schedule   peak               slots beyond 6 a microbatch, with at least 2p microbatches
    V-Half     (p + 2) // 2       3p - 7 (p even), 3p - 4 (p odd), 1 (p = 2)
    V-Min      (p + 4) // 3       at most 4p - 5, with p a multiple of 3 4p - 7
    V-ZB       p                  p - 1
"""

from __future__ import annotations

from collections.abc import Callable

from longcat_model.pipeline.ir import Action, Kind, Placement, Row, Schedule, v_placement
from longcat_model.pipeline.schedules.fill import fill, shortest

PERIOD = 6  # slots: F, I and W of two stages
Block = tuple[dict[tuple[int, Kind], int], ...]  # [device] (stage, kind) -> slot of microbatch 0


def v_half(devices: int, microbatches: int) -> Schedule:
    """Half the memory of 1F1B and about half its idle time. Raises ValueError as `check` does."""
    return _v(half_block, devices, microbatches, 2 * ((devices + 2) // 2))


def v_min(devices: int, microbatches: int) -> Schedule:
    """A third of the memory of 1F1B. Raises ValueError as `check` does."""
    return _v(min_block, devices, microbatches, 2 * ((devices + 4) // 3))


def v_zb(devices: int, microbatches: int) -> Schedule:
    """The memory of 1F1B, and nothing idle but the first and last slots. Raises ValueError as `check` does."""
    return _v(zb_block, devices, microbatches, 2 * devices)


def half_block(devices: int) -> Block:
    """The block of V-Half."""
    gap = 3 if devices % 2 == 0 else 0  # without it two actions would share a slot
    return _block(
        devices,
        lambda i: (2 * i, 3 * devices - i - 2, 3 * devices + gap + 2 * i - 1, 6 * devices + gap - i - 2),
    )


def min_block(devices: int) -> Block:
    """The block of V-Min."""
    gap = 2 if devices % 3 == 0 else 0
    return _block(devices, lambda i: (i, 2 * devices - i - 1, 2 * devices + gap + i, 4 * devices + gap - i - 1))


def zb_block(devices: int) -> Block:
    """The block of V-ZB: a step down takes 4 slots, a step up 2."""
    return _block(
        devices,
        lambda i: (4 * i, 6 * devices - 5 - 2 * i, 6 * devices - 4 + 4 * i, 12 * devices - 9 - 2 * i),
    )


def _block(devices: int, slots: Callable[[int], tuple[int, int, int, int]]) -> Block:
    """A block from the slots, on each device, of F down, F up, I up and I down."""

    def device(i: int) -> dict[tuple[int, Kind], int]:
        down, up = i, 2 * devices - 1 - i
        names = ((down, Kind.F), (up, Kind.F), (up, Kind.I), (down, Kind.I))
        block = dict(zip(names, slots(i), strict=True))
        for stage in (up, down):
            taken = {slot % PERIOD for slot in block.values()}
            slot = block[stage, Kind.I] + 1
            while slot % PERIOD in taken:
                slot += 1
            block[stage, Kind.W] = slot
        return block

    return tuple(map(device, range(devices)))


def repeat(block: Block, microbatches: int) -> Schedule:
    """The block, once for each microbatch, PERIOD slots apart."""

    def row(slots: dict[tuple[int, Kind], int]) -> Row:
        timed = (
            (slot + PERIOD * microbatch, Action(stage, kind, microbatch))
            for (stage, kind), slot in slots.items()
            for microbatch in range(microbatches)
        )
        return tuple(action for _, action in sorted(timed))

    return tuple(map(row, block))


def check(name: str, devices: int, microbatches: int) -> None:
    """Raises ValueError unless there is at least one device and one microbatch."""
    if devices < 1 or microbatches < 1:
        raise ValueError(
            f"{name}: devices and microbatches must be at least 1, got {devices} devices, {microbatches} microbatches"
        )


def _v(make: Callable[[int], Block], devices: int, microbatches: int, limit: int) -> Schedule:
    """The repeated block with the slots filled in which a device would wait while microbatches begin and end."""
    check("schedule", devices, microbatches)
    placement: Placement = v_placement(devices)
    plain = repeat(make(devices), microbatches)
    early = fill(plain, placement, limit, hoist=True, weights_last=False)
    candidates = [
        fill(base, placement, limit, hoist=hoist, weights_last=True)
        for base in (plain, early)
        for hoist in (False, True)
    ]
    return shortest([early, *candidates], placement, microbatches)
