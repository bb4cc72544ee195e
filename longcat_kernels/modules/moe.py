"""Mixture of experts with identity experts (LongCat-Flash, arXiv 2509.01322, section 2.1).

Dimension key
    T tokens    E real experts    Z identity experts    k experts of one token    D model    F hidden units of an expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from longcat_kernels.modules.expert_parallel import ExpertParallel
from longcat_kernels.ops.fused_moe import fused_moe
from longcat_kernels.ops.moe_route import moe_route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Routed(NamedTuple):
    """What `MoE` gives."""

    output: Tensor  # the shape and dtype of the input
    router_logits: Tensor  # [T, E + Z] float32: for the z-loss and the balance loss
    ids: Tensor  # [T, k] int64: the experts of each token, identity experts from E on


class Router(nn.Module):
    """Linear logits in float32; `e_score_correction_bias` moves the choice of experts, not their weights."""

    e_score_correction_bias: Tensor  # [E + Z] float32

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden, experts, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> logits [T, E + Z] float32."""
        # Autocast would round the logits, and with them the choice of experts.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return functional.linear(x.float(), self.classifier.weight.float())


class MoE(nn.Module):
    """Top-k of E SwiGLU experts and Z identity experts, weighted by the softmax over all of them times `scale`.

    Parameters have the names and the concatenated layout of transformers: `router.classifier.weight` [E + Z, D],
    `gate_up` [E, 2 F, D] (rows of gate first), `down` [E, D, F]; buffer `router.e_score_correction_bias` [E + Z].

    Args:
        hidden: width D.
        width: hidden units F of an expert.
        real: SwiGLU experts E.
        zero: identity experts Z.
        top_k: experts of a token.
        scale: multiplies every weight, those of identity experts included.
        group: share the experts out over its ranks: each has E / ranks of them in `gate_up` and `down`, and the whole
            router; see `ExpertParallel`. With the same seed all ranks together have the experts of one process.

    Raises:
        ValueError: the ranks of `group` do not divide E.

    Example:
        >>> moe = MoE(hidden=8, width=4, real=4, zero=2, top_k=3, scale=6.0)
        >>> routed = moe(torch.randn(2, 5, 8))
        >>> routed.output.shape, routed.router_logits.shape, routed.ids.shape
        (torch.Size([2, 5, 8]), torch.Size([10, 6]), torch.Size([10, 3]))
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        real: int,
        zero: int,
        top_k: int,
        scale: float,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.real, self.zero, self.top_k, self.scale = real, zero, top_k, scale
        self.router = Router(hidden, real + zero)
        self.parallel = None if group is None else ExpertParallel(group, real)
        own = slice(None) if self.parallel is None else slice(self.parallel.own.start, self.parallel.own.stop)
        self.gate_up = nn.Parameter(torch.randn(real, 2 * width, hidden)[own] * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(real, hidden, width)[own] * width**-0.5)

    def forward(self, x: Tensor) -> Routed:
        """x [..., D] -> `Routed`; gradients to x, all parameters and, through router_logits, to the router."""
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.router(x_TD)
        bias_E = self.router.e_score_correction_bias
        weights_Tk, ids_Tk = moe_route(logits_TE, self.top_k, n_real=self.real, bias=bias_E.float(), scale=self.scale)
        # Under autocast x may be narrower than the parameters.
        run = fused_moe if self.parallel is None else self.parallel.fused_moe
        out_TD = run(x_TD, self.gate_up.to(x.dtype), self.down.to(x.dtype), ids_Tk, weights_Tk)
        return Routed(out_TD.view(x.shape), logits_TE, ids_Tk)

    def extra_repr(self) -> str:
        return f"real={self.real}, zero={self.zero}, top_k={self.top_k}, scale={self.scale}"
