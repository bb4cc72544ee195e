"""Gradient of `moe_route` to the logits; the scores are computed again.

Dimension key
    T tokens    E experts, identity experts included    k experts of one token    R, W rows and padded width of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import cast
from longcat_kernels.triton._numeric import DTYPES, folds, tile_rows
from longcat_kernels.triton.moe_route import scores, why_not

__all__ = ["run", "why_not"]


@triton.jit(do_not_specialize=["scale"])
def route_backward_kernel(
    grad_ptr,  # [T, k]
    logits_ptr,  # [T, E]
    ids_ptr,  # [T, k] int64
    out_ptr,  # [T, E]
    T,
    E,
    SLOTS,  # k
    row_stride,
    column_stride,
    scale,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORM: tl.constexpr,
    OUT: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.arange(0, WIDTH)
    score_RW = scores(logits_ptr, row_R, T, E, row_stride, column_stride, WIDTH, SOFTMAX)
    total_R = tl.zeros((ROWS,), tl.float32)
    dot_R = tl.zeros((ROWS,), tl.float32)
    grad_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    chosen_RW = tl.zeros((ROWS, WIDTH), tl.int32)
    for slot in range(0, SLOTS):
        at_R = row_R.to(tl.int64) * SLOTS + slot
        id_R = tl.load(ids_ptr + at_R, row_R < T, other=-1)
        grad_R = tl.load(grad_ptr + at_R, row_R < T, other=0.0).to(tl.float32) * scale
        own_RW = column_W[None, :] == id_R[:, None]
        if RENORM:
            weight_R = tl.sum(tl.where(own_RW, score_RW, 0.0), 1)
            total_R += weight_R
            dot_R += grad_R * weight_R
        grad_RW = tl.where(own_RW, grad_R[:, None], grad_RW)
        chosen_RW |= own_RW.to(tl.int32)
    if RENORM:
        total_R = tl.where(row_R < T, total_R, 1.0)
        renormed_RW = (grad_RW - (dot_R / total_R)[:, None]) / total_R[:, None]
        grad_RW = tl.where(chosen_RW != 0, renormed_RW, 0.0)
    if SOFTMAX:
        grad_RW = score_RW * (grad_RW - tl.sum(grad_RW * score_RW, 1)[:, None])
    else:
        grad_RW = grad_RW * score_RW * (1 - score_RW)
    inside_RW = (row_R < T)[:, None] & (column_W < E)[None, :]
    tl.store(out_ptr + row_R.to(tl.int64)[:, None] * E + column_W[None, :], cast(grad_RW, OUT), inside_RW)


def run(
    grad_Tk: Tensor, logits_TE: Tensor, ids_Tk: Tensor, score: str, renorm: bool, scale: float, out_TE: Tensor
) -> None:
    """Fills the gradient of the logits."""
    (tokens, experts), wide = logits_TE.shape, 1 << folds(logits_TE.shape[1])
    rows = tile_rows(wide)
    if tokens:
        with on(logits_TE.device):
            route_backward_kernel[(triton.cdiv(tokens, rows),)](
                *(grad_Tk.contiguous(), logits_TE, ids_Tk.contiguous(), out_TE),
                *(tokens, experts, ids_Tk.shape[1], *logits_TE.stride(), scale),
                ROWS=rows,
                WIDTH=wide,
                SOFTMAX=score == "softmax",
                RENORM=renorm,
                OUT=DTYPES[out_TE.dtype],
                num_warps=4,
            )
