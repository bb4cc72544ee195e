"""How ids are chosen: the settings; `longcat_kernels.sample` and `longcat_kernels.depth_decode` draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, then top-k, then top-p, then one draw, which depends on the row's logits, seed and step alone.

    The row of prompt i draws with `seed + i`.
    """

    temperature: float = 1.0  # 0: the most likely id, the lowest on ties
    top_k: int = 0  # keep this many; 0: all
    top_p: float = 1.0  # keep the fewest most likely ids that together reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Sampling: temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")


# The released model's recommendations (its README), without their repetition penalties.
GREEDY = Sampling(temperature=0.0)
IMAGE = Sampling(temperature=0.5, top_k=1024, top_p=0.75)
SPEECH = Sampling(temperature=0.5, top_k=5, top_p=0.85)
TRANSCRIPT = Sampling(temperature=0.2, top_k=20, top_p=0.85)
