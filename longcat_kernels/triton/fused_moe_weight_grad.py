"""Weight pass of `fused_moe`'s backward: products summed over the rows of an expert.

An expert without rows gets zeros, or is left as it is where gradients are added.

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import cast
from longcat_kernels.triton._moe import Plan
from longcat_kernels.triton._numeric import DTYPES, padded, tile_rows
from longcat_kernels.triton.fused_moe import why_not
from longcat_kernels.triton.grouped_mm import sum_rows

__all__ = ["run", "why_not"]


@triton.jit
def act_kernel(
    hidden_ptr,  # [R, 2 F]
    weights_ptr,  # [T k]
    slots_ptr,  # [R]
    rows_ptr,  # [] how many rows there are
    act_ptr,  # out [R, F]
    F,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """Weight times silu(gate) * up."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = row < tl.load(rows_ptr)
    inside = there[:, None] & (column < F)[None, :]
    slot = tl.load(slots_ptr + row, there, other=0)
    weight = tl.load(weights_ptr + slot, there, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    hidden_ptrs = hidden_ptr + at + row.to(tl.int64)[:, None] * F
    gate = tl.load(hidden_ptrs, inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptrs + F, inside, other=0.0).to(tl.float32)
    tl.store(act_ptr + at, cast(gate * tl.sigmoid(gate) * up * weight[:, None], OUT), inside)


def run(
    grad_TD: Tensor,
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    hidden_RF: Tensor,
    grad_hidden_RF: Tensor,
    add: bool,
    grad_gate_up: Tensor | None,
    grad_down: Tensor | None,
) -> None:
    """Fills, or adds to, the gradients that are wanted."""
    experts = next(len(grad) for grad in (grad_gate_up, grad_down) if grad is not None)
    with on(x_TD.device):
        plan = Plan.of(ids_Tk, experts, x_TD)
        if grad_gate_up is not None and grad_gate_up.numel():
            sum_rows(grad_hidden_RF, x_TD, grad_gate_up, plan.ends, b_index=plan.tokens, add=add)
        if grad_down is not None and grad_down.numel():
            act_RF = _weighted_act(hidden_RF, weights_Tk, plan)
            sum_rows(grad_TD, act_RF, grad_down, plan.ends, a_index=plan.tokens, add=add)


def _weighted_act(hidden_RF: Tensor, weights_Tk: Tensor, plan: Plan) -> Tensor:
    slots, width = len(plan.slots), hidden_RF.shape[1] // 2
    act_RF = hidden_RF.new_empty(slots, width)
    wide = min(1024, padded(width))
    rows = tile_rows(wide)
    if slots:
        act_kernel[(triton.cdiv(slots, rows), triton.cdiv(width, wide))](
            *(hidden_RF, weights_Tk.contiguous(), plan.slots, plan.offsets[-1], act_RF, width),
            ROWS=rows,
            WIDTH=wide,
            OUT=DTYPES[act_RF.dtype],
            num_warps=4,
        )
    return act_RF
