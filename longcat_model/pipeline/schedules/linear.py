"""1F1B, its interleaved form and ZB-H1: stages in the order of devices (loop_placement)."""

from __future__ import annotations

from longcat_model.pipeline.ir import Action, Kind, Row, Schedule, loop_placement
from longcat_model.pipeline.schedules.fill import fill
from longcat_model.pipeline.schedules.v import check


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """1F1B: each device warms up, then alternates one forward and one backward.

    Source: Narayanan et al., PipeDream-Flush (arXiv 2006.09503). Idle: 3 (p - 1) durations of F; holds p microbatches.
    Raises ValueError as `check` does.
    """
    return interleaved_1f1b(devices, microbatches, chunks=1)


def interleaved_1f1b(devices: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: `chunks` stages a device; microbatches go in groups of `devices`, the last may be smaller.

    Source: Narayanan et al., Megatron-LM (arXiv 2104.04473). Raises ValueError as `check` does.
    """
    check("schedule", devices, microbatches)
    groups = [range(first, min(first + devices, microbatches)) for first in range(0, microbatches, devices)]
    walk = [(chunk, microbatch) for group in groups for chunk in range(chunks) for microbatch in group]
    back = [(chunk, microbatch) for group in groups for chunk in reversed(range(chunks)) for microbatch in group]

    def row(device: int) -> Row:
        forwards = [Action(chunk * devices + device, Kind.F, microbatch) for chunk, microbatch in walk]
        backwards = [Action(chunk * devices + device, Kind.B, microbatch) for chunk, microbatch in back]
        # Before a device's first backward, all of the first group must be through all chunks but the last.
        ahead = devices - device - 1 if chunks == 1 else 2 * (devices - device - 1) + (chunks - 1) * len(groups[0])
        warmup = min(ahead, len(forwards))
        steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
        return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :])

    return tuple(map(row, range(devices)))


def zb_h1(devices: int, microbatches: int) -> Schedule:
    """ZB-H1: 1F1B with W apart, which fills the idle slots; no more memory than 1F1B.

    Source: Qi et al., Zero Bubble Pipeline Parallelism (arXiv 2401.10241). Raises ValueError as `check` does.
    """
    joint = one_f_one_b(devices, microbatches)
    apart = tuple(tuple(part for action in row for part in _parts(action)) for row in joint)
    return fill(apart, loop_placement(devices), devices, hoist=False, weights_last=True)


def _parts(action: Action) -> Row:
    return tuple(action._replace(kind=kind) for kind in ((Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,)))
