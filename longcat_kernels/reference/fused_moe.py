"""Mixture of SwiGLU experts with identity experts, defined: formula, hand-written passes, cases and cost.

`fused_moe` is the definition. `forward`, `input_grad` and `weight_grad` compute the same from rows sorted by expert:
what the op runs where no kernel can, and what a kernel's passes look like.

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longcat_kernels.spec import Cost, Refusal


def fused_moe(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    main_gate_up: Tensor | None,
    main_down: Tensor | None,
    packed: list[Tensor],
    rows: int,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """out[t] = residual[t] + sum over slots j of weights[t, j] * expert(ids[t, j])(x[t]), and what backward needs.

    expert(e)(x) = down[e] @ (silu(gate) * up) with gate | up = gate_up[e] @ x; x itself for e >= E, 0 for e < 0. The
    second result is gate | up of each row, by expert, then slot, and zeros up to `rows`; with `recompute`, no rows.
    """
    hidden = []
    out_TD = identity_part(x, ids, weights, down.shape[0])
    for expert, (up_FD, down_DF) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        tokens_R, slots_R = torch.where(ids == expert)
        hidden.append(x[tokens_R] @ up_FD.T)
        gate_RF, up_RF = hidden[-1].chunk(2, dim=1)
        y_RD = (functional.silu(gate_RF) * up_RF) @ down_DF.T
        out_TD = out_TD.index_add(0, tokens_R, (weights[tokens_R, slots_R, None] * y_RD).to(out_TD.dtype))
    if residual is not None:
        out_TD = out_TD + residual
    hidden_RF = torch.cat(hidden)
    if recompute or rows == 0:
        return out_TD, hidden_RF[:0].detach()
    return out_TD, torch.cat([hidden_RF, hidden_RF.new_zeros(rows - len(hidden_RF), gate_up.shape[1])]).detach()


def identity_part(vectors: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Each token's vector [T, D] times the weights of its identity slots; 0 for a token without one, even of NaN."""
    is_identity = ids >= experts
    total_T1 = torch.where(is_identity, weights, 0).sum(1, keepdim=True)
    return torch.where(is_identity.any(1, keepdim=True), total_T1 * vectors, 0)


@dataclass(frozen=True)
class Plan:
    """Where the rows of each expert come from.

    Example: ids [[1, 0], [7, 1]] with 2 experts gives slots [1, 0, 3], spans [(0, 1), (1, 3)], rows [[1, 0], [3, 2]]:
    row 0 is slot 1 (token 0, expert 0), rows 1 and 2 are slots 0 and 3 (expert 1), and slot 2 has no row, written as 3.
    """

    slots: Tensor  # [R] flat slot of each row
    tokens: Tensor  # [R] token of each row
    spans: list[tuple[int, int]]  # rows of each expert, half-open
    rows: Tensor  # [T, k] row of each slot; R: none

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Plan:
        flat = ids.reshape(-1)
        flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
        ends: list[int] = torch.bincount(flat, minlength=experts + 1).cumsum(0).tolist()
        slots_R = flat.argsort(stable=True)[: ends[experts - 1]]
        total = len(slots_R)
        rows = torch.full_like(flat, total)
        rows[slots_R] = torch.arange(total, device=ids.device)
        spans = list(zip([0, *ends[: experts - 1]], ends[:experts], strict=True))
        return cls(slots_R, slots_R // max(1, ids.shape[1]), spans, rows.view(ids.shape))

    def combine(self, y_RD: Tensor, weights_Tk: Tensor | None = None) -> Tensor:
        """Sums each token's rows in slot order, weighted."""
        padded = torch.cat([y_RD, y_RD.new_zeros(1, y_RD.shape[1])])
        if weights_Tk is not None:
            weights_Tk = torch.where(self.rows < len(y_RD), weights_Tk, 0).to(y_RD.dtype)
        return functional.embedding_bag(self.rows, padded, mode="sum", per_sample_weights=weights_Tk)

    def products(self, a_R: Tensor, w_E: Tensor, out_R: Tensor) -> Tensor:
        """out[rows of e] = a[rows of e] @ w[e]."""
        for (start, end), w in zip(self.spans, w_E.unbind(), strict=True):
            if end > start:
                torch.mm(a_R[start:end], w.to(a_R.dtype), out=out_R[start:end])
        return out_R

    def outer_products(self, a_R: Tensor, b_R: Tensor, add: bool, out_E: Tensor) -> None:
        """out[e] = a[rows of e]^T @ b[rows of e], added if `add`; exact zeros for an expert without rows."""
        for (start, end), out in zip(self.spans, out_E.unbind(), strict=True):
            product = a_R[start:end].T @ b_R[start:end]
            out.copy_(out + product if add else product)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _swiglu(hidden_RF: Tensor) -> Tensor:
    gate_RF, up_RF = hidden_RF.chunk(2, dim=1)
    return functional.silu(gate_RF).mul_(up_RF)


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    main_gate_up: Tensor | None,
    main_down: Tensor | None,
    packed: list[Tensor],
    rows: int,
    recompute: bool,
    out: Tensor,
    saved: Tensor,
) -> None:
    """Writes out [T, D] and, where `saved` has rows, the pre-activations [rows, 2 F] (zero past row R)."""
    plan, dtype = Plan.of(ids, down.shape[0]), _wide(x.dtype)
    x_RD = x.to(dtype).index_select(0, plan.tokens)
    hidden_RF = plan.products(x_RD, gate_up.mT, x_RD.new_empty(len(x_RD), gate_up.shape[1]))
    if len(saved):
        saved[: len(x_RD)] = hidden_RF
        saved[len(x_RD) :] = 0
    y_RD = plan.products(_swiglu(hidden_RF), down.mT, torch.empty_like(x_RD))
    out_TD = plan.combine(y_RD, weights) + identity_part(x.to(dtype), ids, weights.to(dtype), down.shape[0])
    out.copy_(out_TD if residual is None else out_TD + residual)


def hidden(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, rows: int, saved: Tensor) -> None:
    """Writes the pre-activations alone, as `forward` does."""
    plan, dtype = Plan.of(ids, down.shape[0]), _wide(x.dtype)
    x_RD = x.to(dtype).index_select(0, plan.tokens)
    saved[: len(x_RD)] = plan.products(x_RD, gate_up.mT, x_RD.new_empty(len(x_RD), gate_up.shape[1]))
    saved[len(x_RD) :] = 0


def input_grad(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    grad_x: Tensor,
    grad_weights: Tensor,
    grad_hidden: Tensor,
) -> None:
    """Writes grad_x [T, D], grad_weights [T, k] and grad_hidden [rows, 2 F] (zero past row R), from `hidden`."""
    plan, dtype = Plan.of(ids, down.shape[0]), _wide(x.dtype)
    total = len(plan.slots)
    grad_TD = grad.to(dtype)
    gate_RF, up_RF = hidden[:total].to(dtype).chunk(2, dim=1)
    sigmoid_RF = gate_RF.sigmoid()
    silu_RF = gate_RF * sigmoid_RF
    grad_act_RF = plan.products(grad_TD.index_select(0, plan.tokens), down, torch.empty_like(silu_RF))
    row_grad_R = (grad_act_RF * silu_RF * up_RF).sum(1)
    grad_act_RF *= weights.reshape(-1)[plan.slots, None].to(dtype)
    grad_gate_RF = grad_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    grad_RF = torch.cat([grad_gate_RF, grad_act_RF * silu_RF], 1)
    grad_hidden[:total] = grad_RF
    grad_hidden[total:] = 0

    identity = ids >= down.shape[0]
    grad_x_RD = plan.products(grad_RF, gate_up, grad_TD.new_empty(total, x.shape[1]))
    grad_x.copy_(plan.combine(grad_x_RD) + identity_part(grad_TD, ids, weights.to(dtype), down.shape[0]))
    slot_grad = torch.where(identity, (grad_TD * x.to(dtype)).sum(1, keepdim=True), 0).reshape(-1)
    slot_grad[plan.slots] = row_grad_R
    grad_weights.copy_(slot_grad.view(ids.shape))


def weight_grad(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    grad_hidden: Tensor,
    add: bool,
    grad_gate_up: Tensor | None,
    grad_down: Tensor | None,
) -> None:
    """Writes, or adds to, grad_gate_up [E, 2 F, D] and grad_down [E, D, F], from `hidden` and its gradient."""
    wanted = [t for t in (grad_gate_up, grad_down) if t is not None]
    plan, dtype = Plan.of(ids, len(wanted[0])), _wide(x.dtype)
    total = len(plan.slots)
    if grad_gate_up is not None:
        x_RD = x.to(dtype).index_select(0, plan.tokens)
        plan.outer_products(grad_hidden[:total].to(dtype), x_RD, add, grad_gate_up)
    if grad_down is not None:
        act_RF = _swiglu(hidden[:total].to(dtype)) * weights.reshape(-1)[plan.slots, None].to(dtype)
        plan.outer_products(grad.to(dtype).index_select(0, plan.tokens), act_RF, add, grad_down)


@dataclass(frozen=True)
class Case:
    """One problem size; `ids` says which experts are hit: any of all, identity only, one real only, some ignored."""

    tokens: int
    dim: int
    width: int
    real: int
    zero: int
    k: int
    ids: str = "any"
    residual: bool = False
    save: str = "h"
    dtype: torch.dtype = torch.float32

    @property
    def inner(self) -> float:
        """Pre-activations, activations and their gradients are rounded to the dtype before they are multiplied."""
        return 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps


EDGE = (
    Case(0, 8, 4, 2, 1, 2),
    Case(1, 1, 1, 1, 0, 1),
    Case(19, 7, 5, 6, 3, 3, residual=True),
    Case(19, 7, 5, 6, 3, 3, "identity"),
    Case(19, 7, 5, 6, 0, 2, "one", save="x"),
    Case(19, 8, 4, 5, 2, 3, "ignored"),
    Case(40, 70, 37, 3, 2, 2, "ignored", residual=True, dtype=torch.float16),
    Case(33, 16, 24, 4, 2, 3, dtype=torch.bfloat16),
)
MODEL = (Case(4096, 3072, 1024, 256, 128, 12, dtype=torch.bfloat16),)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        return torch.randn(shape, generator=g).div(fan**0.5).to(device, case.dtype).requires_grad_()

    ids_Tk = torch.rand(case.tokens, case.real + case.zero, generator=g).argsort(1)[:, : case.k]
    if case.ids == "identity":
        ids_Tk = ids_Tk % max(1, case.zero) + case.real
    elif case.ids == "one":
        ids_Tk = torch.zeros_like(ids_Tk)
    elif case.ids == "ignored":
        ids_Tk = torch.where(ids_Tk % 3 == 0, -1, ids_Tk)
    return {
        "x": normal(case.tokens, case.dim),
        "gate_up": normal(case.real, 2 * case.width, case.dim, fan=case.dim),
        "down": normal(case.real, case.dim, case.width, fan=case.width),
        "ids": ids_Tk.to(device),
        "weights": torch.rand(case.tokens, case.k, generator=g).to(device).requires_grad_(),
        "residual": normal(case.tokens, case.dim) if case.residual else None,
        "save": case.save,
    }


def cost(case: Case) -> Cost:
    """Every expert's weights read once, tokens read and written once; real experts do the share of slots they have."""
    rows = case.tokens * case.k * case.real // (case.real + case.zero)
    weights = 3 * case.real * case.dim * case.width
    slots = case.tokens * case.k * 12
    moved = case.dtype.itemsize * (weights + 2 * case.tokens * case.dim) + slots
    return Cost(flops=6 * rows * case.dim * case.width, bytes=moved)


REFUSALS = (
    Refusal("x must be [T, D], got [8]", lambda a: {"x": torch.ones(8)}),
    Refusal("x must be floating point, got torch.int64", lambda a: {"x": a["x"].long()}),
    Refusal("gate_up must be [E, 2 F, 8] with E >= 1, got [2, 8, 7]", lambda a: {"gate_up": torch.ones(2, 8, 7)}),
    Refusal("gate_up must be [E, 2 F, 8] with E >= 1, got [2, 7, 8]", lambda a: {"gate_up": torch.ones(2, 7, 8)}),
    Refusal("down must be [2, 8, 4], got [3, 8, 4]", lambda a: {"down": torch.ones(3, 8, 4)}),
    Refusal("down must have the dtype of x, torch.float32, got torch.float64", lambda a: {"down": a["down"].double()}),
    Refusal("ids must be int64 [0, k] with k >= 1, got torch.int32 [0, 2]", lambda a: {"ids": a["ids"].int()}),
    Refusal("ids must be int64 [0, k] with k >= 1, got torch.int64 [0, 0]", lambda a: {"ids": a["ids"][:, :0]}),
    Refusal("weights must be floating point [0, 2], got torch.float32 [0, 3]", lambda a: {"weights": torch.ones(0, 3)}),
    Refusal(
        "residual must be torch.float32 [0, 8], got torch.float32 [0, 7]", lambda a: {"residual": torch.ones(0, 7)}
    ),
    Refusal("save must be h or x, got 'y'", lambda a: {"save": "y"}),
    Refusal(
        "main_grads must be torch.float32 [2, 8, 8], got torch.float64 [2, 8, 8]",
        lambda a: {"main_grads": (a["gate_up"].double(), a["down"])},
    ),
    Refusal(
        "main_grads must be contiguous, got strides (64, 1, 8)",
        lambda a: {"main_grads": (torch.zeros(2, 8, 8).mT, torch.zeros(2, 8, 4))},
    ),
    Refusal(
        "prepared must be made of gate_up and down, got one made of other tensors",
        lambda a: {"prepared": SimpleNamespace(gate_up=a["gate_up"], down=a["down"].clone())},
    ),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
