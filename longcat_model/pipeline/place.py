"""Which layers each stage gets: the model split in V order so that no device has much more to do than another.

Device d has stages d and 2p - 1 - d. Stage 0 begins with the embedding and the last ends with the modality losses, so
that device 0 has both and the embedding table needs no transfer; layers come to device 0 too where that is better.
Source: LongCat-Next report, section 5.1 (profile first, losses beside the embedding, head with a few layers elsewhere).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from longcat_model.pipeline.costs import Costs
from longcat_model.pipeline.ir import v_placement
from longcat_model.pipeline.profile import Profile, Split, lengths, stage_costs
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import simulate

SPLITS = 50_000  # up to so many are all looked at
SIMULATED = 400  # of so many the schedule is simulated, at most


@dataclass(frozen=True)
class Placed:
    """A split, and how far it can be from the best."""

    split: Split
    costs: Costs
    makespan: float  # of V-Half
    lower_bound: float  # no split has a shorter V-Half: proved

    @property
    def gap(self) -> float:
        """By which share of the bound the makespan is above it."""
        return self.makespan / self.lower_bound - 1.0 if self.lower_bound else 0.0


def place(profile: Profile, devices: int, microbatches: int) -> Placed:
    """The split whose V-Half is shortest: of all splits where they are few, else of those that a descent meets.

    Where they are few, splits are simulated in the order of the work of their busiest device, which no schedule can
    beat, until that exceeds the shortest makespan found: then no other can be better, and the gap is zero.

    Raises:
        ValueError: the profile has no layers, or devices or microbatches are fewer than one.
    """
    if not profile.layers or devices < 1 or microbatches < 1:
        raise ValueError("place: there must be layers, and devices and microbatches must be at least 1")
    search = _Search(profile, devices, microbatches)
    heads = range(2 * devices - 2, 2 * devices)  # farther down it would only be farther from the losses
    count = sum(math.comb(len(profile.layers) + head, head) for head in heads)
    split, bound = search.all_splits(heads) if count <= SPLITS else search.descent(heads)
    makespan = search.makespan(split)
    return Placed(split, stage_costs(profile, split, microbatches), makespan, min(bound, makespan))


class _Search:
    """Splits of one profile, and what they cost."""

    def __init__(self, profile: Profile, devices: int, microbatches: int) -> None:
        by_length, by_loss = lengths(profile, microbatches)
        self.profile, self.devices, self.microbatches = profile, devices, microbatches
        self.work = [layer.work * sum(by_length) for layer in profile.layers]
        self.sums = list(itertools.accumulate(self.work, initial=0.0))
        self.head = profile.text_head.work * sum(by_length)
        self.ends = profile.embedding.work * sum(by_length) + profile.modality_losses.work * sum(by_loss)
        self.order = v_half(devices, microbatches)
        self.simulated: dict[Split, float] = {}

    def makespan(self, split: Split) -> float:
        """Of V-Half; remembered."""
        if split not in self.simulated:
            costs = stage_costs(self.profile, split, self.microbatches)
            self.simulated[split] = simulate(self.order, v_placement(self.devices), costs).makespan
        return self.simulated[split]

    def fixed(self, head: int) -> list[float]:
        """[device] What each has to do besides layers."""
        work = [0.0] * self.devices
        work[0] += self.ends
        work[min(head, 2 * self.devices - 1 - head)] += self.head
        return work

    def busiest(self, split: Split) -> float:
        """The work of the device that has the most."""
        first = list(itertools.accumulate(split.layers, initial=0))
        stage = [self.sums[b] - self.sums[a] for a, b in itertools.pairwise(first)]
        return max(stage[d] + stage[-1 - d] + more for d, more in enumerate(self.fixed(split.head)))

    def all_splits(self, heads: range) -> tuple[Split, float]:
        """The best split, and a bound that none is below."""
        layers, stages = len(self.work), 2 * self.devices
        splits = [
            Split(tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers))) + (0,) * (stages - 1 - head), head)
            for head in heads
            for cuts in itertools.combinations_with_replacement(range(layers + 1), head)
        ]
        splits.sort(key=lambda split: (self.busiest(split), split.layers, split.head))
        best = splits[0]
        for number, split in enumerate(splits):
            if number == SIMULATED or self.busiest(split) >= self.makespan(best):
                return best, self.busiest(split)
            best = min(best, split, key=self.makespan)
        return best, self.makespan(best)

    def descent(self, heads: range) -> tuple[Split, float]:
        """From a balanced split, one layer moved at a time while that helps."""
        best = min((self.balanced(head) for head in heads), key=self.makespan)
        while True:
            near = sorted(_moved(best), key=self.busiest)
            better = next((one for one in near if self.allowed() and self.makespan(one) < self.makespan(best)), None)
            if better is None:
                return best, min(self.least(head) for head in heads)
            best = better

    def allowed(self) -> bool:
        return len(self.simulated) < SIMULATED

    def least(self, head: int) -> float:
        """What the busiest device has at least: layers poured on like water, or dealt whole where all are alike."""
        fixed = sorted(self.fixed(head))
        levels = ((self.sums[-1] + sum(fixed[:n])) / n for n in range(1, len(fixed) + 1))
        level = max(min(levels), fixed[-1])
        size = max(self.work)
        if min(self.work) < size or not size:
            return level
        tops = sorted(more + size * n for more in fixed for n in range(len(self.work) + 1))
        return next(t for t in tops if t >= fixed[-1] and sum(round((t - f) // size) for f in fixed) >= len(self.work))

    def balanced(self, head: int) -> Split:
        """Layers dealt to the stages in order, each up to its share of that level."""
        level, fixed, last = self.least(head), self.fixed(head), 2 * self.devices - 1
        room = [max(0.0, level - more) / 2 for more in fixed]
        shares = [room[min(stage, last - stage)] for stage in range(last + 1)]
        for stage in range(head + 1, last + 1):  # no layers after the head
            shares[last - stage] += shares[stage]
            shares[stage] = 0.0
        total = list(itertools.accumulate(shares, initial=0.0))
        scale = self.sums[-1] / total[-1] if total[-1] else 0.0
        cuts = [min(range(len(self.sums)), key=lambda n: abs(self.sums[n] - at * scale)) for at in total]
        cuts[-1] = len(self.work)
        counts = [b - a for a, b in itertools.pairwise(cuts)]
        for stage in range(head + 1, last + 1):
            counts[head] += counts[stage]
            counts[stage] = 0
        return Split(tuple(counts), head)


def _moved(split: Split) -> Iterator[Split]:
    """One layer moved from a stage to another."""
    for source, target in itertools.permutations(range(split.head + 1), 2):
        if split.layers[source]:
            counts = list(split.layers)
            counts[source] -= 1
            counts[target] += 1
            yield Split(tuple(counts), split.head)
