"""How ids are chosen: the settings; `longcat_kernels.sample` and `longcat_kernels.depth_decode` draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Repetition penalty, temperature, top_k, top_p, min_p, then one draw: it depends on the row's logits, what the row
    has written, seed and step alone.

    The row of prompt i draws with `seed + i`.
    """

    temperature: float = 1.0  # 0: the most likely id, the lowest on ties
    top_k: int = 0  # keep this many; 0: all
    top_p: float = 1.0  # keep the fewest most likely ids that together reach this probability
    min_p: float = 0.0  # keep ids at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # of ids written since the prompt, of codes at the same level
    order: str = "sequential"  # top_p is a share of what top_k kept; "joint": of everything
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Sampling: temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"Sampling: min_p must be in [0, 1), got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"Sampling: repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if self.order not in ("sequential", "joint"):
            raise ValueError(f"Sampling: order must be sequential or joint, got {self.order!r}")

    def numbers(self) -> dict[str, Any]:
        """What `longcat_kernels.sample` and `DepthSampling` take of them."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "order")
        return {name: getattr(self, name) for name in names}


# The released model's recommendations (its README). Images and speech stand here without repetition penalties, as the
# demo draws them; `settings.Settings` has those.
GREEDY = Sampling(temperature=0.0)
SEE = Sampling(temperature=0.4, top_k=40, top_p=0.85, repetition_penalty=1.1)  # text about an image
HEAR = Sampling(temperature=0.2, top_k=20, top_p=0.85, repetition_penalty=1.1)  # text about sound
IMAGE = Sampling(temperature=0.5, top_k=1024, top_p=0.75)
SPEECH = Sampling(temperature=0.5, top_k=5, top_p=0.85)
TRANSCRIPT = Sampling(temperature=0.2, top_k=20, top_p=0.85)
