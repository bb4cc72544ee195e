"""Sums over the rows that have the same code, in the order of their number, without atomics.

Dimension key
    N rows    K entries    W width of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def segments(codes_N: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Row numbers grouped by code, [N], and where the group of each entry starts in them, [K + 1]."""
    sorted_N, order_N = torch.sort(codes_N.contiguous(), stable=True)
    return order_N, torch.searchsorted(sorted_N, torch.arange(entries + 1, device=codes_N.device))


@triton.jit
def segment_sum(
    vectors_ptr, order_ptr, start, end, row_stride, place_W, inside_W, WIDTH: tl.constexpr, TYPE: tl.constexpr
):
    """Adds the rows order[start : end] one after the other, in TYPE; eight are on their way at a time."""
    total_W = tl.zeros((WIDTH,), TYPE)
    for first in range(0, end - start, 8):
        for step in tl.static_range(8):
            at = start + first + step
            row = tl.load(order_ptr + tl.minimum(at, end - 1))
            here_W = inside_W & (tl.zeros_like(place_W) + at < end)  # as a block: triton 3.9 interprets others wrongly
            vector_W = tl.load(vectors_ptr + row * row_stride + place_W, here_W, other=0.0)
            total_W += vector_W.to(tl.float32).to(TYPE)
    return total_W
