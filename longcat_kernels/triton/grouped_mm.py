"""Grouped matrix product: tiles of rows that each belong to one group, or one output tile a program where rows are
summed over.

Offsets are on the device and are not waited for: what decreases or leaves the ragged dimension is cut to it.

Dimension key
    E groups    R rows of all groups    M, N rows and columns of a tile, or sides of a product    K summed over
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import (
    TYPES,
    Tile,
    accumulate,
    cast,
    describe,
    in_vectors,
    multiply_add,
    shared_bytes,
    tile_of,
    weights_of,
    zero_tail,
)
from longcat_kernels.triton._numeric import DTYPES, INTERPRETED
from longcat_kernels.triton.moe_plan import cut


@triton.jit
def rows_kernel(
    a,  # [R, K] or its descriptor
    b,  # [E, K, N] or its descriptor
    out_ptr,  # [R, N]
    ends_ptr,  # [E]
    tiles_ptr,  # [tiles, 2] int32: group and first row, or -1
    R,
    N,
    K,
    a_row,
    a_column,
    b_group,
    b_k,
    b_n,
    out_row,
    out_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    A_DESCRIBED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
    OUT: tl.constexpr,
):
    columns = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * COLUMNS
    group = tl.load(tiles_ptr + 2 * tile)
    if group >= 0:
        first = tl.load(tiles_ptr + 2 * tile + 1)
        row_M = first + tl.arange(0, ROWS)
        n_N = n + tl.arange(0, COLUMNS)
        inside_M = row_M < tl.minimum(tl.load(ends_ptr + group), R)
        at_M = tl.where(inside_M, row_M, 0).to(tl.int64) * a_row
        sum_MN = accumulate(
            *(a, at_M, first, a_column, b, group, n, N, K, b_group, b_k, b_n),
            *(COLUMNS, DEPTH, A_DESCRIBED, DESCRIBED, K_INNER, EVEN),
        )
        at_MN = row_M.to(tl.int64)[:, None] * out_row + n_N.to(tl.int64)[None, :] * out_column
        tl.store(out_ptr + at_MN, cast(sum_MN, OUT), inside_M[:, None] & (n_N < N)[None, :])


@triton.jit
def _indirect(index_ptr, r_K, inside_K, INDIRECT: tl.constexpr):
    """Numbers of the rows at `r`."""
    return tl.load(index_ptr + r_K, inside_K, other=0) if INDIRECT else r_K


@triton.jit
def sums_kernel(
    a_ptr,  # [R, M]
    b_ptr,  # [R, N]
    out_ptr,  # [E, M, N]
    a_index_ptr,  # [R] int32: which row of a; not read unless A_INDIRECT
    b_index_ptr,
    ends_ptr,  # [E]
    R,
    M,
    N,
    a_row,
    a_column,
    b_row,
    b_column,
    out_group,
    out_row,
    out_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    A_INDIRECT: tl.constexpr,
    B_INDIRECT: tl.constexpr,
    ADD: tl.constexpr,
    OUT: tl.constexpr,
):
    """out[e] = a[rows of e]^T @ b[rows of e], added if ADD; zeros for a group without rows."""
    columns = tl.cdiv(N, COLUMNS)
    tiles = tl.cdiv(M, ROWS) * columns
    group = tl.program_id(0) // tiles
    within = tl.program_id(0) % tiles
    m_M = within // columns * ROWS + tl.arange(0, ROWS)
    n_N = within % columns * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends_ptr + group)
    start = tl.load(ends_ptr + tl.maximum(group - 1, 0)) * tl.minimum(group, 1)
    start, end = tl.maximum(start, 0).to(tl.int32), tl.minimum(end, R).to(tl.int32)
    a_at_M = m_M.to(tl.int64) * a_column
    b_at_N = n_N.to(tl.int64) * b_column
    sum_MN = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(start, end, DEPTH):
        r_K = r + tl.arange(0, DEPTH)
        inside_K = r_K < end
        a_row_K = _indirect(a_index_ptr, r_K, inside_K, A_INDIRECT).to(tl.int64) * a_row
        b_row_K = _indirect(b_index_ptr, r_K, inside_K, B_INDIRECT).to(tl.int64) * b_row
        a_inside_MK = inside_K[None, :] if EVEN else inside_K[None, :] & (m_M < M)[:, None]
        b_inside_KN = inside_K[:, None] if EVEN else inside_K[:, None] & (n_N < N)[None, :]
        a_MK = tl.load(a_ptr + a_row_K[None, :] + a_at_M[:, None], a_inside_MK, other=0.0)
        b_KN = tl.load(b_ptr + b_row_K[:, None] + b_at_N[None, :], b_inside_KN, other=0.0)
        sum_MN = multiply_add(a_MK, b_KN, sum_MN)
    inside_MN = (m_M < M)[:, None] & (n_N < N)[None, :]
    at_MN = m_M.to(tl.int64)[:, None] * out_row + n_N.to(tl.int64)[None, :] * out_column
    ptrs_MN = out_ptr + group.to(tl.int64) * out_group + at_MN
    if ADD:
        sum_MN += tl.load(ptrs_MN, inside_MN, other=0.0)
    tl.store(ptrs_MN, cast(sum_MN, OUT), inside_MN)


def multiply_rows(a_RK: Tensor, b_EKN: Tensor, out_RN: Tensor, ends_E: Tensor, tiles_N2: Tensor, tile: Tile) -> None:
    """out[rows of e] = a[rows of e] @ b[e], of groups that end at `ends` and that `tiles_N2` cuts as `tile` says."""
    weights, constants = weights_of(b_EKN, tile)
    found = describe(a_RK, [tile.rows, tile.depth], tile)
    (_, depth, columns), rows = b_EKN.shape, a_RK.shape[0]
    rows_kernel[(len(tiles_N2) * triton.cdiv(columns, tile.columns),)](
        *(a_RK if found is None else found, weights[0], out_RN, ends_E, tiles_N2),
        *(rows, columns, depth, *a_RK.stride(), *weights[1:], *out_RN.stride()),
        A_DESCRIBED=found is not None,
        OUT=DTYPES[out_RN.dtype],
        **constants,
        **tile.options(),
    )


def sum_rows(
    a_RM: Tensor,
    b_RN: Tensor,
    out_EMN: Tensor,
    ends_E: Tensor,
    *,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
    add: bool = False,
) -> None:
    """out[e] = sum of a[r]^T b[r] over the rows r of group e; with an index, of the rows of a or b that it names."""
    groups, height, width = out_EMN.shape
    indirect = a_index is not None or b_index is not None
    tile = sums_tile(a_RM.dtype, indirect, in_vectors(a_RM, b_RN, out_EMN))
    rows = next((len(index) for index in (a_index, b_index) if index is not None), len(a_RM))
    sums_kernel[(groups * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns),)](
        *(a_RM, b_RN, out_EMN, ends_E if a_index is None else a_index, ends_E if b_index is None else b_index, ends_E),
        *(rows, height, width, *a_RM.stride(), *b_RN.stride(), *out_EMN.stride()),
        EVEN=not INTERPRETED and height % tile.rows == 0 and width % tile.columns == 0,  # 3.2 interprets whole masks
        A_INDIRECT=a_index is not None,
        B_INDIRECT=b_index is not None,
        ADD=add,
        OUT=DTYPES[out_EMN.dtype],
        **tile.options(),
    )


def sums_tile(dtype: torch.dtype, indirect: bool, vectors: bool) -> Tile:
    """The tile of sums over rows, one for all sizes; numbers of rows are on their way two steps before the rows are."""
    stages = 5 if indirect else 3
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4 if vectors else 8, stages, vectors)
    side = 128 if vectors else 64
    return Tile(side, side, 64, 8, stages, vectors)


def why_not(*inputs: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    dtype = inputs[0].dtype
    return None if dtype in TYPES else f"takes float32, bfloat16 and float16, got {dtype}"


def run(a: Tensor, b: Tensor, offs: Tensor | None, out: Tensor) -> None:
    """Fills `out`; without a ragged dimension this is the batched product of torch."""
    if offs is None:
        torch.bmm(a, b, out=out)
    elif not out.numel():
        return
    elif not len(offs):
        out.zero_()
    elif a.ndim == 3:
        run(b.T, a.mT, offs, out.T)
    elif b.ndim == 2:
        with on(a.device):
            sum_rows(a.T, b, out, offs.contiguous())
    else:
        with on(a.device):
            ends_E = offs.contiguous()
            vectors = in_vectors(a, b, out if out.stride(1) == 1 else out.T)
            tile = tile_of(a.shape[0], b.shape[0], a.dtype, shared_bytes(a.device), vectors=vectors)
            multiply_rows(a, b, out, ends_E, cut(ends_E, a.shape[0], tile.rows), tile)
            zero_tail(out, ends_E[-1])
