"""Mixture of experts: a plan, two products of tiles of rows that belong to one expert, and a sum over slots.

The first product gathers its rows and ends with SwiGLU; neither gathered rows nor a second copy of the weights exist.
Sums over slots are in the order of the slots, no atomics: the same inputs give the same bits, and so does a token in
any batch whose tiles (`_gemm.tile_of`) have the same shape.

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import TYPES, zero_tail
from longcat_kernels.triton._moe import Plan, combine, multiply_up
from longcat_kernels.triton.grouped_mm import multiply_rows


def why_not(*inputs: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    dtype = inputs[0].dtype
    return None if dtype in TYPES else f"takes float32, bfloat16 and float16, got {dtype}"


def run(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    residual_TD: Tensor | None,
    main_gate_up: Tensor | None,
    main_down: Tensor | None,
    packed: list[Tensor],
    rows: int,
    recompute: bool,
    out_TD: Tensor,
    hidden_RF: Tensor,
) -> None:
    """Fills out and, where it has rows, hidden: gate | up of the plan's rows, then zeros."""
    if not x_TD.numel():
        hidden_RF.zero_()
        return
    (experts, dim, width), slots = down_EDF.shape, ids_Tk.numel()
    with on(x_TD.device):
        plan = Plan.of(ids_Tk, experts, x_TD, gate_up_EFD, down_EDF)
        act_RF, y_RD = x_TD.new_empty(slots, width), x_TD.new_empty(slots, dim)
        save = len(hidden_RF) > 0
        multiply_up(x_TD, gate_up_EFD, plan, hidden_RF if save else None, act_RF)
        if save:
            zero_tail(hidden_RF, plan.offsets[-1])
        multiply_rows(act_RF, down_EDF.mT, y_RD, plan.ends, plan.tiles, plan.tile(x_TD.dtype))
        combine(y_RD, x_TD, ids_Tk, weights_Tk, plan, out_TD, weighted=True, residual=residual_TD)
