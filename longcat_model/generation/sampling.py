"""Choosing ids from logits: temperature, then top-k, then top-p, then one draw a row.

A draw is a pure function of (seed, step): no generator's state, so a row gets the same id whatever else is in the
batch and however often the batch shrank before.

Dimension key
    N rows    V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose ids. The row of prompt i draws with `seed + i`."""

    temperature: float = 1.0  # 0: the most likely id, the lowest on ties
    top_k: int = 0  # keep this many; 0: all
    top_p: float = 1.0  # keep the fewest most likely ids that together reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"Sampling: temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")


# The released model's recommendations (its README), without their repetition penalties.
GREEDY = Sampling(temperature=0.0)
IMAGE = Sampling(temperature=0.5, top_k=1024, top_p=0.75)
SPEECH = Sampling(temperature=0.5, top_k=5, top_p=0.85)
TRANSCRIPT = Sampling(temperature=0.2, top_k=20, top_p=0.85)


def sample(logits: Tensor, sampling: Sampling, seeds: Tensor, step: int) -> Tensor:
    """One id a row.

    Args:
        logits: [N, V]; -inf where an id must not be chosen.
        seeds: int64 [N], used in place of `sampling.seed`.
        step: which draw of its seed this is.

    Returns:
        int64 [N].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Stable: among equal logits the lower id comes first, on every device.
    ordered_NV, ids_NV = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered_NV[:, sampling.top_k :] = -torch.inf
    mass_NV = ordered_NV.softmax(-1)
    before_NV = mass_NV.cumsum(-1) - mass_NV
    mass_NV = mass_NV.masked_fill(before_NV >= sampling.top_p, 0)
    reached_NV = mass_NV.cumsum(-1)
    wanted_N1 = uniform(seeds, step).to(reached_NV)[:, None] * reached_NV[:, -1:]
    place_N1 = (reached_NV <= wanted_N1).sum(-1, keepdim=True)
    return ids_NV.gather(1, place_N1.clamp(max=logits.shape[1] - 1)).squeeze(1)


def uniform(seeds: Tensor, step: int) -> Tensor:
    """float64 [N] in [0, 1): the splitmix64 finalizer (Steele, Lea, Flood 2014) of seed and step, its upper 53 bits."""
    x = _mix(seeds.to(torch.int64) + _signed(GOLDEN))
    x = _mix(x + _signed((step + 1) * GOLDEN % 2**64))
    return _shift(x, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's int64 shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
