"""Makespans that no order of actions can beat, whatever the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import Placement


def lower_bound(placement: Placement, costs: Costs, limits: Sequence[int] | None = None) -> float:
    """The largest of four lower bounds of the makespan; the two of memory only where `limits` [device] are given.

    work: a device cannot begin before a microbatch has come to it, and then has all its work to do.
    chain: one microbatch through all stages and back.
    memory before the first backward: until then a device does no more forwards than it can hold.
    memory and time: what all activations take of it, each at least from its forward to its weight gradient.
    """
    chains = [_Chain(placement, costs, microbatch) for microbatch in range(costs.microbatches)]
    bounds = [max(chain.total for chain in chains)]
    for device in range(max(placement) + 1):
        own = [stage for stage, where in enumerate(placement) if where == device]
        work = sum(map(costs.stage_work, own))
        bounds.append(min(chain.begins[own[0]] for chain in chains) + work)
        if limits is not None:
            first_backward = min(chain.backward_begins[own[-1]] for chain in chains)
            bounds.append(first_backward + work - _forwards_that_fit(own, costs, limits[device]))
            area = sum(
                costs.saved[stage][k] * chain.residence(stage) for k, chain in enumerate(chains) for stage in own
            )
            bounds.append(area / limits[device] if limits[device] else 0.0)
    return max(bounds)


class _Chain:
    """The earliest times of one microbatch that has all devices to itself."""

    def __init__(self, placement: Placement, costs: Costs, microbatch: int) -> None:
        stages, k = range(len(placement)), microbatch
        moves = [costs.transfer[stage][k] if placement[stage] != placement[stage + 1] else 0.0 for stage in stages[:-1]]
        forward, back = [costs.forward[s][k] for s in stages], [costs.input[s][k] for s in stages]
        self.begins = list(accumulate((f + move for f, move in zip(forward, moves, strict=False)), initial=0.0))
        top = self.begins[-1] + forward[-1]
        steps = (back[s] + moves[s - 1] for s in reversed(stages[1:]))
        self.backward_begins = list(accumulate(steps, initial=top))[::-1]
        self._back = back
        self._weight = [costs.weight[s][k] for s in stages]
        self.total = self.backward_begins[0] + back[0] + self._weight[0]

    def residence(self, stage: int) -> float:
        """From the begin of F to the end of W, at least."""
        return self.backward_begins[stage] + self._back[stage] + self._weight[stage] - self.begins[stage]


def _forwards_that_fit(own: Sequence[int], costs: Costs, limit: int) -> float:
    """More than the forwards can take that a device does before its first backward, where it frees nothing."""
    smallest = min(size for stage in own for size in costs.saved[stage])
    durations = sorted((duration for stage in own for duration in costs.forward[stage]), reverse=True)
    return sum(durations[: limit // smallest] if smallest else durations)
