"""From compute actions to what a runtime executes: the list of passes, each followed by `verify`."""

from __future__ import annotations

from collections.abc import Callable, Collection

from longcat_model.pipeline.costs import Costs, uniform
from longcat_model.pipeline.ir import Placement, Schedule
from longcat_model.pipeline.passes.free import free_activations
from longcat_model.pipeline.passes.merge import merge_backward
from longcat_model.pipeline.passes.recompute import recompute
from longcat_model.pipeline.passes.reduce import reduce_gradients
from longcat_model.pipeline.passes.transfers import add_transfers
from longcat_model.pipeline.verify import verify


def lower(
    schedule: Schedule,
    placement: Placement,
    microbatches: int,
    costs: Costs | None = None,
    recomputed: Collection[int] = (),
) -> Schedule:
    """Adds all that a schedule of F, I, W and B needs to run; the result is verified.

    `costs` decide when a receive is posted (where None: F, I and W take 1); `recomputed` are stages whose forwards are
    done again.

    Raises:
        ValueError: `schedule` is not one that can run (see verify).
    """
    times = costs or uniform(len(placement), microbatches)
    passes: list[Callable[[Schedule], Schedule]] = [
        lambda s: merge_backward(s, placement),
        lambda s: recompute(s, recomputed),
        lambda s: add_transfers(s, placement, times),
        free_activations,
        reduce_gradients,
    ]
    verify(schedule, placement, microbatches, times)
    for one in passes:
        schedule = one(schedule)
        verify(schedule, placement, microbatches, times)
    return schedule
