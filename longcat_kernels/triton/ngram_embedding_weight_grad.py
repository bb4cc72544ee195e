"""Gradients of `ngram_embedding`: sums of the rows that looked up the same row, in the order of the positions.

Every position that looked something up has the same share, so that it multiplies sums instead of rows.

Dimension key
    P positions    N tables    W width of a table    I widths of all tables    D model    U rows of a gradient
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import TYPES, cast, in_vectors, shared_bytes, tile_of
from longcat_kernels.triton._numeric import DTYPES, INTERPRETED, padded
from longcat_kernels.triton._segments import segments
from longcat_kernels.triton.grouped_mm import multiply_rows, sum_rows
from longcat_kernels.triton.moe_plan import cut
from longcat_kernels.triton.ngram_embedding import gather


@triton.jit
def rows_grad_kernel(
    vectors_ptr,  # [P, W]
    order_ptr,  # [P] int64: positions grouped by row
    starts_ptr,  # [U + 1] int64
    out_ptr,  # [U, W]
    U,
    W,
    row_stride,
    column_stride,
    share,
    first_whole,  # rows whose positions have a share of 1
    end_whole,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_RW = (row_R < U)[:, None] & (column_W < W)[None, :]
    place_W = column_W.to(tl.int64) * column_stride
    start_R = tl.load(starts_ptr + row_R, row_R < U, other=0)
    end_R = tl.load(starts_ptr + row_R + 1, row_R < U, other=0)
    sum_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, tl.max(end_R - start_R, 0), 8):
        for step in tl.static_range(8):  # eight are on their way at a time
            at_R = start_R + first + step
            position_R = tl.load(order_ptr + at_R, at_R < end_R, other=0)
            vector_ptrs = vectors_ptr + position_R[:, None] * row_stride + place_W[None, :]
            sum_RW += tl.load(vector_ptrs, inside_RW & (at_R < end_R)[:, None], other=0.0).to(tl.float32)
    share_R = tl.where((row_R >= first_whole) & (row_R < end_whole), 1.0, share)
    at_RW = row_R.to(tl.int64)[:, None] * W + column_W[None, :]
    tl.store(out_ptr + at_RW, cast(sum_RW * share_R[:, None], OUT), inside_RW)


def why_not(grad_BSD: Tensor, *_: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    return None if grad_BSD.dtype in TYPES else f"takes float32, bfloat16 and float16, got {grad_BSD.dtype}"


def run(
    grad_BSD: Tensor,
    ids_BS: Tensor,
    hashes_BSN: Tensor,
    slots_BSN: Tensor,
    sizes: list[int],
    tables: list[Tensor],
    projections: list[Tensor],
    numbers: list[int],
    words: int,
    projected: bool,
    grad_word_VD: Tensor,
    *grads: Tensor,
) -> None:
    """Fills the gradients that are wanted: those with rows."""
    if not ids_BS.numel():
        for grad in (grad_word_VD, *grads):
            grad.zero_()
        return
    grad_PD, share = grad_BSD.reshape(-1, grad_BSD.shape[2]), 1 / (1 + len(tables))
    hashes_PN = hashes_BSN.reshape(-1, len(tables))
    with on(grad_BSD.device):
        if words:
            _sum_by_row(grad_PD, ids_BS.reshape(-1), share, grad_word_VD, whole=(numbers[3], numbers[4]))
        if any(sizes):
            slots_PN = slots_BSN.reshape(-1, len(tables)).masked_fill(hashes_PN == 0, -1)
            row_grads_PI = _times(grad_PD, torch.cat(projections, 1))
            widths = [projection.shape[1] for projection in projections]
            for grad, part_PW, slots_P in zip(grads, row_grads_PI.split(widths, 1), slots_PN.unbind(1), strict=False):
                _sum_by_row(part_PW, slots_P, share, grad)
        if projected:
            _projection_grads(grad_PD, hashes_PN, tables, share, grads[len(tables) :])


def _sum_by_row(
    vectors_PW: Tensor, row_P: Tensor, share: float, out_UW: Tensor, whole: tuple[int, int] = (0, 0)
) -> None:
    """out[u] = share (1 for the rows in `whole`) times the sum of the vectors of row u; negative rows are left out."""
    if not out_UW.numel():
        return
    (rows, width), order_and_starts = out_UW.shape, segments(row_P, len(out_UW))
    wide, at_once = min(1024, padded(width)), 64 if INTERPRETED else 1
    rows_grad_kernel[(triton.cdiv(rows, at_once), triton.cdiv(width, wide))](
        *(vectors_PW, *order_and_starts, out_UW, rows, width, *vectors_PW.stride(), share, *whole),
        ROWS=at_once,
        WIDTH=wide,
        OUT=DTYPES[out_UW.dtype],
        num_warps=4,
    )


def _times(a_PK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b in float32."""
    (positions, _), columns = a_PK.shape, b_KN.shape[1]
    out_PN = a_PK.new_empty(positions, columns, dtype=torch.float32)
    vectors = in_vectors(a_PK, b_KN[None], out_PN)
    tile = tile_of(positions, 1, a_PK.dtype, shared_bytes(a_PK.device), vectors=vectors)
    end = torch.full((1,), positions, dtype=torch.int32, device=a_PK.device)
    multiply_rows(a_PK, b_KN[None], out_PN, end, cut(end, positions, tile.rows), tile)
    return out_PN


def _projection_grads(
    grad_PD: Tensor, hashes_PN: Tensor, tables: list[Tensor], share: float, grads: tuple[Tensor, ...]
) -> None:
    widths = [table.shape[1] for table in tables]
    rows_PI = torch.cat([gather(table, hash_P) for table, hash_P in zip(tables, hashes_PN.unbind(1), strict=True)], 1)
    out_DI = grad_PD.new_empty(1, grad_PD.shape[1], sum(widths), dtype=torch.float32)
    end = torch.full((1,), len(grad_PD), dtype=torch.int32, device=grad_PD.device)
    sum_rows(grad_PD, rows_PI, out_DI, end)
    for grad, part_DW in zip(grads, out_DI[0].split(widths, 1), strict=True):
        torch.mul(part_DW, share, out=grad)
