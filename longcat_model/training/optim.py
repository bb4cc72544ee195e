"""AdamW with decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the betas of the released fine-tuning code; norms and biases are not decayed.

    That code differs in the rest: eps 1e-16, no decay, a constant rate, and embeddings at 5.33 times that rate.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), eps=1e-10, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Linear warm-up over the share `warmup` of `steps`, then a cosine from `peak` to `floor` * `peak`.

    Example:
        >>> [round(learning_rate(step, 100, 1.0), 2) for step in (0, 4, 5, 99)]
        [0.2, 1.0, 1.0, 0.1]
    """
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    done = (step - ramp) / max(1, steps - ramp)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
