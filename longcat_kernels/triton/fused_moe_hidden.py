"""The pre-activations of `fused_moe` alone, for a backward that did not keep them.

Dimension key
    T tokens    k slots of a token    R rows    E real experts    D model    F hidden units of an expert
"""

from __future__ import annotations

from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import zero_tail
from longcat_kernels.triton._moe import Plan, multiply_up
from longcat_kernels.triton.fused_moe import why_not

__all__ = ["run", "why_not"]


def run(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, rows: int, hidden_RF: Tensor) -> None:
    """Fills hidden as `fused_moe` does."""
    if hidden_RF.numel():
        with on(x_TD.device):
            plan = Plan.of(ids_Tk, len(down_EDF), x_TD, gate_up_EFD, down_EDF)
            multiply_up(x_TD, gate_up_EFD, plan, hidden_RF, None)
            zero_tail(hidden_RF, plan.offsets[-1])
