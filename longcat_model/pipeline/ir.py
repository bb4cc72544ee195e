"""A pipeline schedule as plain data: for each device, the ordered actions it runs.

Text form of an action is `<stage><kind><microbatch>`: `3F0` is the forward of microbatch 0 on stage 3. The grammar is
that of torch.distributed.pipelining, so that its parser reads our schedules and we read its; two kinds, R and FREE, are
our own (`for_torch` leaves them out).

    >>> parse("0F0 0F1 0B0 0B1\\n1F0 1B0 1F1 1B1")[1][1]
    Action(stage=1, kind=<Kind.B: 'B'>, microbatch=0)

Which device runs a stage is a `Placement`, a value beside the schedule. Facts that follow from both (who receives what)
are functions here; what is measured or learned of a schedule (durations, start times) never enters an action.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Kind(str, Enum):
    """What an action does; the comments say for (stage, microbatch)."""

    F = "F"  # forward
    I = "I"  # noqa: E741  gradient of the input: what the stage before waits for
    W = "W"  # gradient of the weights, from what I left behind
    B = "B"  # I and W in one
    R = "R"  # forward again right before the backward; then F keeps nothing but its input
    SEND_F = "SEND_F"  # the output of F goes to the stage after
    RECV_F = "RECV_F"  # the input of F comes from the stage before
    SEND_B = "SEND_B"  # the gradient that I or B made goes to the stage before
    RECV_B = "RECV_B"  # the gradient of the output comes from the stage after
    FREE = "FREE"  # nothing of this microbatch is kept on this stage any longer
    REDUCE_GRAD = "REDUCE_GRAD"  # of the stage, all microbatches: gradients are summed over the data-parallel replicas
    UNSHARD = "UNSHARD"  # of the stage, all microbatches: sharded weights are gathered
    RESHARD = "RESHARD"  # of the stage, all microbatches: gathered weights are dropped


ALL = -1  # the microbatch of an action that belongs to a stage as a whole; its text form has none: 3REDUCE_GRAD

COMPUTE = frozenset({Kind.F, Kind.I, Kind.W, Kind.B, Kind.R})
SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})
OF_STAGE = frozenset({Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD})
UNKNOWN_TO_TORCH = frozenset({Kind.R, Kind.FREE})


class Action(NamedTuple):
    """One thing that a device does."""

    stage: int
    kind: Kind
    microbatch: int  # ALL for the kinds in OF_STAGE

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.microbatch == ALL else self.microbatch}"


Row = tuple[Action, ...]  # what one device does, in order
Schedule = tuple[Row, ...]  # [device][position]
Placement = tuple[int, ...]  # [stage] -> device

_ACTION = re.compile(rf"(\d+)({'|'.join(sorted((kind.value for kind in Kind), key=len, reverse=True))})(\d*)")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    """Inverse of `str(action)`.

    Raises:
        ValueError: `text` is no action.
    """
    match = _ACTION.fullmatch(text.strip())
    if match is None or (match[3] == "") != (Kind(match[2]) in OF_STAGE):
        raise ValueError(f"schedule: an action must read <stage><kind><microbatch>, as in 3F0, got {text!r}")
    return Action(int(match[1]), Kind(match[2]), int(match[3] or ALL))


def parse(text: str) -> Schedule:
    """Inverse of `show`: one line a device, actions separated by spaces. Raises ValueError as `parse_action` does."""
    return tuple(tuple(map(parse_action, line.split())) for line in text.splitlines())


def show(schedule: Schedule) -> str:
    """The text form: one line a device, each ended, actions separated by spaces."""
    return "".join(" ".join(map(str, row)) + "\n" for row in schedule)


def from_csv(text: str) -> Schedule:
    """A schedule from torch's CSV: one row a device, one action a cell.

    Empty cells (idle slots) are dropped; `(7F1;0B3)OVERLAP_F_B` becomes its parts in order, which is how torch runs it.
    Raises ValueError as `parse_action` does.
    """

    def actions(cell: str) -> Iterable[Action]:
        overlap = _OVERLAP.fullmatch(cell.strip())
        return (parse_action(part) for part in (overlap[1].split(";") if overlap else [cell]) if part.strip())

    rows = csv.reader(io.StringIO(text))
    return tuple(tuple(action for cell in row for action in actions(cell)) for row in rows)


def to_csv(schedule: Schedule) -> str:
    """One row a device, one action a cell; after `for_torch` or `compute_only`, what torch reads."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([str(action) for action in row] for row in schedule)
    return out.getvalue()


def without(schedule: Schedule, kinds: Iterable[Kind]) -> Schedule:
    """The schedule less all actions of `kinds`."""
    dropped = frozenset(kinds)
    return tuple(tuple(action for action in row if action.kind not in dropped) for row in schedule)


def for_torch(schedule: Schedule) -> Schedule:
    """What torch's parser knows: all but R and FREE."""
    return without(schedule, UNKNOWN_TO_TORCH)


def compute_only(schedule: Schedule) -> Schedule:
    """F, I, W and B alone: what torch calls the compute_only format, and what generators make."""
    return without(schedule, set(Kind) - {Kind.F, Kind.I, Kind.W, Kind.B})


def v_placement(devices: int) -> Placement:
    """Two stages a device, down and up again: device d runs stages d and 2 * devices - 1 - d."""
    return (*range(devices), *reversed(range(devices)))


def loop_placement(devices: int, chunks: int = 1) -> Placement:
    """`chunks` stages a device, round and round: stage s runs on device s % devices."""
    return tuple(range(devices)) * chunks


def transfer(action: Action, placement: Placement) -> Action | None:
    """The SEND action that carries the result of `action` (F, I or B) away; None where no other device waits for it."""
    if action.kind is Kind.F and action.stage + 1 < len(placement):
        send, to = Kind.SEND_F, action.stage + 1
    elif action.kind in (Kind.I, Kind.B) and action.stage > 0:
        send, to = Kind.SEND_B, action.stage - 1
    else:
        return None
    return None if placement[to] == placement[action.stage] else action._replace(kind=send)


def counterpart(action: Action) -> Action:
    """The RECV action of a SEND action, and the other way round.

    >>> str(counterpart(parse_action("3SEND_F0"))), str(counterpart(parse_action("3RECV_B0")))
    ('4RECV_F0', '4SEND_B0')
    """
    step = 1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1
    return Action(action.stage + step, _COUNTERPART[action.kind], action.microbatch)


_COUNTERPART = {
    Kind.SEND_F: Kind.RECV_F,
    Kind.RECV_F: Kind.SEND_F,
    Kind.SEND_B: Kind.RECV_B,
    Kind.RECV_B: Kind.SEND_B,
}
