"""How `depth_decode` draws: numbers for all rows and levels, for each row, each level, or each of both.

Dimension key
    T rows    L levels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_kernels.reference import sampling
from longcat_kernels.reference.depth_weights import DepthConfig

ENDS = ("mask", "level0", "allow")


@dataclass(frozen=True)
class DepthSampling:
    """The numbers of a draw; each may be a tensor that broadcasts to [T, L]: [T, 1] by row, [L] by level.

    Tensors of `order` and `end` are bool: True where the order is "joint", and where "end" may be drawn.

    A draw applies guidance first, then end, repetition penalty, temperature, top_k, top_p and min_p.
    """

    temperature: float | Tensor = 1.0  # 0: the largest logit, the lowest id among equals
    top_k: int | Tensor = 0  # keeps the k largest logits, equal ones by lower id; 0: all
    top_p: float | Tensor = 1.0  # keeps the fewest most probable ids that reach this share
    min_p: float | Tensor = 0.0  # keeps ids at least this share as probable as the most probable one
    repetition_penalty: float | Tensor = 1.0  # of ids in `history`: divides positive logits, multiplies negative ones
    guidance: float | Tensor = 1.0  # s of pairs: logits = s * (conditional - unconditional) + unconditional
    order: str | Tensor = "sequential"  # top_p's share is of what top_k kept (transformers); "joint": of all
    end: str | Tensor = "mask"  # where "end" may be drawn: "mask" nowhere, "level0", "allow" everywhere

    def table(self, rows: int, config: DepthConfig, device: torch.device | str = "cpu") -> Tensor:
        """The numbers as kernels read them: float32 [T, L, 8], see `sampling.COLUMNS`.

        `depth_decode` takes it in place of this: made once, it spares every call the making and is what a CUDA graph
        replays with, whatever is written to it.

        Raises:
            ValueError: a number is out of range, or a tensor does not broadcast.
        """
        op, shape, device = "depth_decode", (rows, config.levels), torch.device(device)
        order, excluded = sampling.order_column(op, self.order), self._excluded(config, shape, device)
        values = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return sampling.table(op, (*values, excluded, self.guidance, order), shape, device)

    def _excluded(self, config: DepthConfig, shape: tuple[int, ...], device: torch.device) -> int | Tensor:
        """How many of the last ids may not be drawn."""
        if isinstance(self.end, Tensor):
            if self.end.dtype != torch.bool:
                raise ValueError(
                    f"depth_decode: end must be mask, level0, allow or a bool tensor, got {self.end.dtype}"
                )
            sampling.check_broadcast("depth_decode", "end", self.end, shape, device)
            return ~self.end if config.ends else torch.zeros_like(self.end)
        if self.end not in ENDS:
            raise ValueError(f"depth_decode: end must be mask, level0, allow or a bool tensor, got {self.end!r}")
        if self.end == "level0" and config.ends:
            return torch.arange(config.levels, device=device) > 0
        return int(self.end == "mask" and config.ends)
