"""What the passes of `fused_moe` share: the plan, the product with SwiGLU, and the sum over a token's slots.

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert    M, N rows and columns of a tile
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import moe_plan
from longcat_kernels.triton._gemm import (
    Tile,
    cast,
    in_vectors,
    load_rows,
    load_weights,
    multiply_add,
    shared_bytes,
    tile_of,
    weights_of,
)
from longcat_kernels.triton._numeric import DTYPES, padded, tile_rows

AT_ONCE: tl.constexpr = tl.constexpr(4)  # slots whose rows are on their way together


class Plan(NamedTuple):
    """`moe_plan`'s results, cut for the tiles of products with matrices that are copied in vectors, or not."""

    counts: Tensor
    offsets: Tensor
    tokens: Tensor
    slots: Tensor
    rows: Tensor
    tiles: Tensor
    vectors: bool

    @property
    def ends(self) -> Tensor:
        return self.offsets[1:]

    def tile(self, dtype: torch.dtype, *, wide: int = 128, parts: int = 1) -> Tile:
        """The tile of a product with these rows."""
        rows, groups, shared = len(self.slots), len(self.counts), shared_bytes(self.slots.device)
        return tile_of(rows, groups, dtype, shared, vectors=self.vectors, wide=wide, parts=parts)

    @classmethod
    def of(cls, ids_Tk: Tensor, experts: int, *matrices: Tensor) -> Plan:
        """Of products with these matrices, of one dtype; fills nothing that must be waited for."""
        slots, new, vectors = ids_Tk.numel(), ids_Tk.new_empty, in_vectors(*matrices)
        height = tile_of(slots, experts, matrices[0].dtype, shared_bytes(ids_Tk.device), vectors=vectors).rows
        sides = (experts, experts + 1, slots, slots, slots, 2 * (experts + triton.cdiv(slots, height)))
        counts, offsets, tokens, slots_R, rows, tiles = (new(side, dtype=torch.int32) for side in sides)
        tiles = tiles.view(-1, 2)
        moe_plan.run(ids_Tk, experts, height, counts, offsets, tokens, slots_R, rows, tiles)
        return cls(counts, offsets, tokens, slots_R, rows, tiles, vectors)


@triton.jit
def up_kernel(
    x_ptr,  # [T, D]
    w,  # gate_up as [2 E, D, F], or its descriptor
    hidden_ptr,  # out [R, 2 F]: gate | up; not written unless SAVE
    act_ptr,  # out [R, F]: silu(gate) * up; not written unless ACT
    tokens_ptr,  # [R]
    ends_ptr,  # [E]
    tiles_ptr,  # [tiles, 2]
    D,
    F,
    x_row,
    x_column,
    w_group,
    w_k,
    w_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
    SAVE: tl.constexpr,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
):
    columns = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * COLUMNS
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert >= 0:
        row_M = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, ROWS)
        inside_M = row_M < tl.load(ends_ptr + expert)
        at_M = tl.load(tokens_ptr + row_M, inside_M, other=0).to(tl.int64) * x_row
        gate_MN = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_MN = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, D, DEPTH):
            x_MK = load_rows(x_ptr, at_M, d, D, x_column, DEPTH, EVEN)
            w_KN = load_weights(w, 2 * expert, n, d, F, D, w_group, w_k, w_n, COLUMNS, DEPTH, DESCRIBED, K_INNER, EVEN)
            gate_MN = multiply_add(x_MK, w_KN, gate_MN)
            w_KN = load_weights(
                w, 2 * expert + 1, n, d, F, D, w_group, w_k, w_n, COLUMNS, DEPTH, DESCRIBED, K_INNER, EVEN
            )
            up_MN = multiply_add(x_MK, w_KN, up_MN)
        n_N = n + tl.arange(0, COLUMNS)
        inside_MN = inside_M[:, None] & (n_N < F)[None, :]
        at_MN = row_M.to(tl.int64)[:, None] * F + n_N[None, :]
        if SAVE:
            hidden_ptrs = hidden_ptr + at_MN + row_M.to(tl.int64)[:, None] * F
            tl.store(hidden_ptrs, cast(gate_MN, OUT), inside_MN)
            tl.store(hidden_ptrs + F, cast(up_MN, OUT), inside_MN)
        if ACT:
            tl.store(act_ptr + at_MN, cast(gate_MN * tl.sigmoid(gate_MN) * up_MN, OUT), inside_MN)


def multiply_up(x_TD: Tensor, gate_up_EFD: Tensor, plan: Plan, hidden: Tensor | None, act: Tensor | None) -> None:
    """Writes gate | up and silu(gate) * up of the plan's rows, where they are wanted."""
    _, width, dim = gate_up_EFD.shape
    halves = gate_up_EFD.unflatten(1, (2, width // 2)).flatten(0, 1).mT
    tile = plan.tile(x_TD.dtype, wide=256, parts=2)
    weights, constants = weights_of(halves, tile)
    if tile.columns == 128 and not constants["DESCRIBED"]:  # pointers to twice 128 columns do not fit the registers
        tile = plan.tile(x_TD.dtype, wide=128, parts=2)
        weights, constants = weights_of(halves, tile)
    unused = x_TD if act is None else act
    up_kernel[(len(plan.tiles) * triton.cdiv(width // 2, tile.columns),)](
        *(x_TD, weights[0], unused if hidden is None else hidden, unused, plan.tokens, plan.ends, plan.tiles),
        *(dim, width // 2, *x_TD.stride(), *weights[1:]),
        SAVE=hidden is not None,
        ACT=act is not None,
        OUT=DTYPES[x_TD.dtype],
        **constants,
        **tile.options(),
    )


@triton.jit
def combine_kernel(
    y_ptr,  # [R, D]
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]; not read unless RESIDUAL
    ids_ptr,  # [T, k] int64
    rows_ptr,  # [T, k] int32
    weights_ptr,  # [T, k]
    out_ptr,  # [T, D]
    T,
    D,
    SLOTS,  # k
    E,
    x_row,
    x_column,
    residual_row,
    residual_column,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
):
    """out = sum over slots, in their order, of weight (or 1) times row, plus the identity experts' weights times x."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (token < T)[:, None] & (column < D)[None, :]
    sum_ = tl.zeros((ROWS, WIDTH), tl.float32)
    identity = tl.zeros((ROWS,), tl.float32)
    has_identity = tl.zeros((ROWS,), tl.int32)
    for first in range(0, SLOTS, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            slot = tl.zeros_like(token) + (first + step)  # a block: triton 3.9 interprets other masks wrongly
            at = token * SLOTS + slot
            here = (token < T) & (slot < SLOTS)
            row = tl.load(rows_ptr + at, here, other=-1)
            other = here & (tl.load(ids_ptr + at, here, other=-1) >= E)
            weight = tl.load(weights_ptr + at, other | (row >= 0), other=0.0).to(tl.float32)
            identity += tl.where(other, weight, 0.0)
            has_identity |= other.to(tl.int32)
            y_ptrs = y_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
            y = tl.load(y_ptrs, inside & (row >= 0)[:, None], other=0.0).to(tl.float32)
            sum_ += y * weight[:, None] if WEIGHTED else y
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None, :] * x_column
    sum_ += tl.load(x_ptrs, inside & (has_identity != 0)[:, None], other=0.0).to(tl.float32) * identity[:, None]
    if RESIDUAL:
        at = token.to(tl.int64)[:, None] * residual_row + column.to(tl.int64)[None, :] * residual_column
        sum_ += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * D + column[None, :], cast(sum_, OUT), inside)


def combine(
    y_RD: Tensor,
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    plan: Plan,
    out_TD: Tensor,
    *,
    weighted: bool,
    residual: Tensor | None = None,
) -> None:
    """out[t] = sum of t's rows, by weight or as they are, plus its identity experts' weights times x[t] + residual."""
    (tokens, dim), slots = x_TD.shape, ids_Tk.shape[1]
    width = min(1024, padded(dim))
    rows = tile_rows(width)
    residual_TD = x_TD if residual is None else residual
    combine_kernel[(triton.cdiv(tokens, rows), triton.cdiv(dim, width))](
        *(y_RD, x_TD, residual_TD, ids_Tk.contiguous(), plan.rows, weights_Tk.contiguous(), out_TD),
        *(tokens, dim, slots, len(plan.counts), *x_TD.stride(), *residual_TD.stride()),
        ROWS=rows,
        WIDTH=width,
        WEIGHTED=weighted,
        RESIDUAL=residual is not None,
        OUT=DTYPES[out_TD.dtype],
        num_warps=4,
    )
