"""Input pass of `fused_moe`'s backward: the gradients of x, of the weights and of the pre-activations.

With a = silu(gate) * up of a row, s its weight and g the gradient of its token: da = g @ down, the weight's gradient is
<da, a>, which needs no second product of the experts, and the gradients of gate and up are s * da times the
derivatives of a.

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert    M, N rows and columns of a tile    P tiles of F
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import accumulate, cast, weights_of, zero_tail
from longcat_kernels.triton._moe import Plan, combine
from longcat_kernels.triton._numeric import DTYPES, folds, padded, tile_rows
from longcat_kernels.triton.fused_moe import why_not
from longcat_kernels.triton.grouped_mm import multiply_rows

__all__ = ["run", "why_not"]


@triton.jit
def _finish(grad_MN, hidden_ptr, grad_hidden_ptr, row_M, inside_M, weight_M, n_N, F, OUT: tl.constexpr):
    """Stores the gradients of gate and up for columns `n` of da; gives <da, a> over them."""
    inside_MN = inside_M[:, None] & (n_N < F)[None, :]
    at_MN = row_M.to(tl.int64)[:, None] * (2 * F) + n_N[None, :]
    gate_MN = tl.load(hidden_ptr + at_MN, inside_MN, other=0.0).to(tl.float32)
    up_MN = tl.load(hidden_ptr + at_MN + F, inside_MN, other=0.0).to(tl.float32)
    sigmoid_MN = tl.sigmoid(gate_MN)
    silu_MN = gate_MN * sigmoid_MN
    sum_M = tl.sum(tl.where(inside_MN, grad_MN * silu_MN * up_MN, 0.0), 1)
    grad_MN *= weight_M[:, None]
    gate_grad_MN = grad_MN * up_MN * (sigmoid_MN + silu_MN * (1 - sigmoid_MN))
    tl.store(grad_hidden_ptr + at_MN, cast(gate_grad_MN, OUT), inside_MN)
    tl.store(grad_hidden_ptr + at_MN + F, cast(grad_MN * silu_MN, OUT), inside_MN)
    return sum_M


@triton.jit
def act_grad_kernel(
    grad_ptr,  # [T, D]
    w,  # down [E, D, F], or its descriptor
    hidden_ptr,  # [R, 2 F]
    weights_ptr,  # [T k]
    grad_hidden_ptr,  # out [R, 2 F]
    parts_ptr,  # out [R, P] float32: parts of <da, a>
    tokens_ptr,  # [R]
    slots_ptr,  # [R]
    ends_ptr,  # [E]
    tiles_ptr,  # [tiles, 2]
    D,
    F,
    grad_row,
    grad_column,
    w_group,
    w_k,
    w_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
    OUT: tl.constexpr,
):
    columns = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // columns
    part = tl.program_id(0) % columns
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert >= 0:
        row_M = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, ROWS)
        inside_M = row_M < tl.load(ends_ptr + expert)
        at_M = tl.load(tokens_ptr + row_M, inside_M, other=0).to(tl.int64) * grad_row
        grad_MN = accumulate(
            *(grad_ptr, at_M, 0, grad_column, w, expert, part * COLUMNS, F, D, w_group, w_k, w_n),
            *(COLUMNS, DEPTH, False, DESCRIBED, K_INNER, EVEN),
        )
        slot_M = tl.load(slots_ptr + row_M, inside_M, other=0)
        weight_M = tl.load(weights_ptr + slot_M, inside_M, other=0.0).to(tl.float32)
        # By halves: all of it at once does not fit the registers.
        halves = tl.permute(tl.reshape(grad_MN, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left_MN, right_MN = tl.split(halves)
        n_N = part * COLUMNS + tl.arange(0, COLUMNS // 2)
        sum_M = _finish(left_MN, hidden_ptr, grad_hidden_ptr, row_M, inside_M, weight_M, n_N, F, OUT)
        n_N += COLUMNS // 2
        sum_M += _finish(right_MN, hidden_ptr, grad_hidden_ptr, row_M, inside_M, weight_M, n_N, F, OUT)
        tl.store(parts_ptr + row_M.to(tl.int64) * columns + part, sum_M, inside_M)


@triton.jit
def weights_grad_kernel(
    grad_ptr,  # [T, D]
    x_ptr,  # [T, D]
    parts_ptr,  # [R, P]
    ids_ptr,  # [T, k] int64
    rows_ptr,  # [T, k] int32
    out_ptr,  # [T, k]
    T,
    D,
    P,
    SLOTS,  # k
    E,
    grad_row,
    grad_column,
    x_row,
    x_column,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    OUT: tl.constexpr,
):
    """The sum of a row's parts; <grad, x> for an identity expert; 0 for an ignored slot."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dot = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, WIDTH):
        column = d + tl.arange(0, WIDTH)
        inside = (token < T)[:, None] & (column < D)[None, :]
        wide, place = token.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
        grad = tl.load(grad_ptr + wide * grad_row + place * grad_column, inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + wide * x_row + place * x_column, inside, other=0.0).to(tl.float32)
        dot += tl.sum(grad * x, 1)
    part = tl.arange(0, PARTS)
    for slot in range(0, SLOTS):
        at = token * SLOTS + slot
        row = tl.load(rows_ptr + at, token < T, other=-1)
        identity = tl.load(ids_ptr + at, token < T, other=-1) >= E
        part_ptrs = parts_ptr + row.to(tl.int64)[:, None] * P + part[None, :]
        parts = tl.load(part_ptrs, (row >= 0)[:, None] & (part < P)[None, :], other=0.0)
        value = tl.where(identity, dot, tl.sum(parts, 1))
        tl.store(out_ptr + at, cast(value, OUT), token < T)


def run(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    hidden_RF: Tensor,
    grad_x_TD: Tensor,
    grad_weights_Tk: Tensor,
    grad_hidden_RF: Tensor,
) -> None:
    """Fills the outputs; the gradient of hidden is zero past the last row."""
    if not x_TD.numel():
        for output in (grad_weights_Tk, grad_hidden_RF):
            output.zero_()
        return
    experts, dim, width = down_EDF.shape
    with on(x_TD.device):
        plan = Plan.of(ids_Tk, experts, grad_TD, gate_up_EFD, down_EDF)
        tile = plan.tile(x_TD.dtype)
        weights, constants = weights_of(down_EDF, tile)
        columns = triton.cdiv(width, tile.columns)
        parts_RP = x_TD.new_empty(len(plan.slots), columns, dtype=torch.float32)
        act_grad_kernel[(len(plan.tiles) * columns,)](
            *(grad_TD, weights[0], hidden_RF, weights_Tk.contiguous(), grad_hidden_RF, parts_RP),
            *(plan.tokens, plan.slots, plan.ends, plan.tiles, dim, width, *grad_TD.stride(), *weights[1:]),
            OUT=DTYPES[x_TD.dtype],
            **constants,
            **tile.options(),
        )
        zero_tail(grad_hidden_RF, plan.offsets[-1])
        _weights_grad(grad_TD, x_TD, parts_RP, ids_Tk, plan, grad_weights_Tk)
        grad_x_RD = x_TD.new_empty(len(plan.slots), dim)
        multiply_rows(grad_hidden_RF, gate_up_EFD, grad_x_RD, plan.ends, plan.tiles, tile)
        combine(grad_x_RD, grad_TD, ids_Tk, weights_Tk, plan, grad_x_TD, weighted=False)


def _weights_grad(grad_TD: Tensor, x_TD: Tensor, parts_RP: Tensor, ids_Tk: Tensor, plan: Plan, out_Tk: Tensor) -> None:
    (tokens, dim), (_, slots), parts = x_TD.shape, ids_Tk.shape, parts_RP.shape[1]
    wide = min(1024, padded(dim))
    rows = tile_rows(wide)
    weights_grad_kernel[(triton.cdiv(tokens, rows),)](
        *(grad_TD, x_TD, parts_RP, ids_Tk.contiguous(), plan.rows, out_Tk),
        *(tokens, dim, parts, slots, len(plan.counts), *grad_TD.stride(), *x_TD.stride()),
        ROWS=rows,
        WIDTH=wide,
        PARTS=1 << folds(parts),
        OUT=DTYPES[out_Tk.dtype],
        num_warps=4,
    )
