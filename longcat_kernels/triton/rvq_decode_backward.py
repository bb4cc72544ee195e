"""Gradient of `rvq_decode` to the codebooks: a segment sum for each level, in row order.

Dimension key
    T rows    D width    L levels    K entries    W width of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import padded
from longcat_kernels.triton._segments import segment_sum, segments


@triton.jit
def decode_backward_kernel(grad_ptr, order_ptr, starts_ptr, out_ptr, D, row_stride, column_stride, WIDTH: tl.constexpr):
    entry = tl.program_id(0)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = column_W < D
    place_W = column_W.to(tl.int64) * column_stride
    start = tl.load(starts_ptr + entry)
    end = tl.load(starts_ptr + entry + 1)
    sum_W = segment_sum(grad_ptr, order_ptr, start, end, row_stride, place_W, inside_W, WIDTH, tl.float32)
    tl.store(out_ptr + entry.to(tl.int64) * D + column_W, sum_W, inside_W)


def run(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], *grads: Tensor) -> None:
    """Fills the gradient of each codebook: float32 sums in row order."""
    width = grad_TD.shape[1]
    columns = min(1024, padded(width))
    with on(grad_TD.device):
        for codes_T, count, out_KD in zip(codes_TL.unbind(1), entries, grads, strict=True):
            order_T, starts = segments(codes_T, count)
            decode_backward_kernel[(count, triton.cdiv(width, columns))](
                *(grad_TD, order_T, starts, out_KD, width, *grad_TD.stride()), WIDTH=columns, num_warps=4
            )
