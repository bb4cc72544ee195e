"""Gradient of `rvq_encode`: residuals are walked again from x and the codes, eight levels a launch.

Dimension key
    T rows    D width    L levels    R, W rows and width of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import DTYPES, round_to
from longcat_kernels.triton.rvq_decode import codeword, groups, of_level, tile


@triton.jit
def encode_backward_kernel(
    x_ptr,  # [T, D], any strides
    grad_ptr,  # [T, D] of `quantized`, any strides; not read unless GRAD
    scale_ptr,  # [L] float32: 2 grad_losses / count
    codes_ptr,  # [T, L] int64
    residual_ptr,  # [T, D] float32: between launches
    total_ptr,
    out_ptr,  # [T, D] of x's dtype
    book0_ptr,
    book1_ptr,
    book2_ptr,
    book3_ptr,
    book4_ptr,
    book5_ptr,
    book6_ptr,
    book7_ptr,
    entries0,
    entries1,
    entries2,
    entries3,
    entries4,
    entries5,
    entries6,
    entries7,
    T,
    D,
    x_row,
    x_column,
    grad_row,
    grad_column,
    row_stride,
    level_stride,
    LEVELS: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_RW = (row_R < T)[:, None] & (column_W < D)[None, :]
    wide_R, wide_W = row_R.to(tl.int64)[:, None], column_W.to(tl.int64)[None, :]
    at_RW = wide_R * D + wide_W
    if FIRST:
        x_RW = tl.load(x_ptr + wide_R * x_row + wide_W * x_column, inside_RW, other=0.0).to(tl.float32)
        residual_RW = round_to(x_RW, RESIDUAL)
        total_RW = tl.zeros((ROWS, WIDTH), tl.float32)
        if GRAD:
            place_RW = wide_R * grad_row + wide_W * grad_column
            total_RW = tl.load(grad_ptr + place_RW, inside_RW, other=0.0).to(tl.float32)
    else:
        residual_RW = tl.load(residual_ptr + at_RW, inside_RW, other=0.0)
        total_RW = tl.load(total_ptr + at_RW, inside_RW, other=0.0)
    for level in tl.static_range(LEVELS):
        book_ptr = of_level(
            level, book0_ptr, book1_ptr, book2_ptr, book3_ptr, book4_ptr, book5_ptr, book6_ptr, book7_ptr
        )
        entries = of_level(level, entries0, entries1, entries2, entries3, entries4, entries5, entries6, entries7)
        word_RW = codeword(book_ptr, entries, codes_ptr, row_R, T, column_W, D, row_stride, level_stride, level)
        residual_RW = round_to(residual_RW - word_RW, RESIDUAL)
        total_RW += tl.load(scale_ptr + level) * residual_RW
    if LAST:
        kept_R = tl.load(codes_ptr + row_R.to(tl.int64) * row_stride, row_R < T, other=-1) >= 0
        total_RW = tl.where(kept_R[:, None], total_RW, 0.0)
        tl.store(out_ptr + at_RW, round_to(total_RW, OUT).to(OUT), inside_RW)
    else:
        tl.store(residual_ptr + at_RW, residual_RW, inside_RW)
        tl.store(total_ptr + at_RW, total_RW, inside_RW)


def run(
    grad_TD: Tensor | None,
    scale_L: Tensor | None,
    x_TD: Tensor,
    codes_TL: Tensor,
    codebooks: list[Tensor],
    residual_dtype: torch.dtype,
    out_TD: Tensor,
) -> None:
    """Fills `out_TD`: what the straight-through estimator and the losses give to x."""
    count, width = x_TD.shape
    if not count:
        return
    rows, columns = tile(width)
    parts = groups(codebooks) if scale_L is not None else groups(codebooks[:1])
    single = len(parts) == 1  # nothing is kept between launches
    residual_TD, total_TD = (
        out_TD if single else torch.empty(count, width, device=x_TD.device) for _ in ("residual", "total")
    )
    with on(x_TD.device):
        for first, levels, books, entries in parts:
            encode_backward_kernel[(triton.cdiv(count, rows), triton.cdiv(width, columns))](
                *(x_TD, x_TD if grad_TD is None else grad_TD, x_TD if scale_L is None else scale_L[first:]),
                *(codes_TL[:, first:], residual_TD, total_TD, out_TD, *books, *entries, count, width),
                *(*x_TD.stride(), *(x_TD if grad_TD is None else grad_TD).stride(), *codes_TL.stride()),
                LEVELS=levels if scale_L is not None else 0,
                GRAD=grad_TD is not None,
                FIRST=first == 0,
                LAST=first + levels == len(codebooks) or single,
                RESIDUAL=DTYPES[residual_dtype],
                OUT=DTYPES[out_TD.dtype],
                ROWS=rows,
                WIDTH=columns,
                num_warps=4,
            )
