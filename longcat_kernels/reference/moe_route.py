"""Top-k routing, defined: the formula in plain PyTorch, the cases it is tested and timed on, and its cost.

Dimension key
    T tokens    E experts, identity experts included    k experts of one token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal


def moe_route(
    logits: Tensor,
    k: int,
    n_real: int,
    bias: Tensor | None,
    score: str,
    renorm: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """ids = top-k of p + bias; weights = scale * p[ids], divided by their sum if `renorm`; p = score(logits).

    Highest first, ties to the lower id; the bias takes part in the choice only (`n_real` in the checks only).
    """
    p_TE = probabilities(logits, score)
    choice_TE = choice(p_TE, bias)
    ids_Tk = choice_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    weights_Tk = p_TE.gather(1, ids_Tk)
    if renorm:
        weights_Tk = weights_Tk / weights_Tk.sum(1, keepdim=True)
    return weights_Tk * scale, ids_Tk


def choice(p_TE: Tensor, bias: Tensor | None) -> Tensor:
    """What is sorted."""
    return p_TE if bias is None else p_TE + bias


def probabilities(logits: Tensor, score: str) -> Tensor:
    """At least float32, whatever the logits are."""
    wide_TE = logits if logits.dtype == torch.float64 else logits.float()
    return wide_TE.softmax(1) if score == "softmax" else wide_TE.sigmoid()


def backward(grad_weights: Tensor, logits: Tensor, ids: Tensor, score: str, renorm: bool, scale: float) -> Tensor:
    """The gradient of `moe_route` by hand: d weights -> d logits, at least float32."""
    p_TE = probabilities(logits, score)
    grad_Tk = grad_weights.to(p_TE.dtype) * scale
    if renorm:
        chosen_Tk = p_TE.gather(1, ids)
        total_T1 = chosen_Tk.sum(1, keepdim=True)
        grad_Tk = (grad_Tk - (grad_Tk * chosen_Tk).sum(1, keepdim=True) / total_T1) / total_T1
    grad_TE = torch.zeros_like(p_TE).scatter_(1, ids, grad_Tk)
    if score == "softmax":
        return p_TE * (grad_TE - (grad_TE * p_TE).sum(1, keepdim=True))
    return grad_TE * p_TE * (1 - p_TE)


@dataclass(frozen=True)
class Case:
    """One problem size; `ties` quantises the logits so that many are equal."""

    tokens: int
    real: int
    zero: int
    k: int
    score: str = "softmax"
    biased: bool = False
    renorm: bool = False
    scale: float = 1.0
    ties: bool = False
    dtype: torch.dtype = torch.float32


EDGE = (
    Case(0, 4, 2, 2, biased=True),
    Case(1, 1, 0, 1),
    Case(17, 5, 3, 3, biased=True, scale=6.0),
    Case(17, 5, 0, 5, renorm=True, scale=2.5),
    Case(33, 0, 4, 2, score="sigmoid", biased=True, renorm=True),
    Case(33, 7, 4, 4, ties=True, scale=3.0),
    Case(17, 5, 3, 3, biased=True, scale=6.0, dtype=torch.bfloat16),
)
MODEL = (Case(4096, 256, 128, 12, biased=True, scale=6.0),)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(case.tokens, case.real + case.zero, generator=g)
    if case.ties:
        logits_TE = logits_TE.round()
    bias_E = torch.randn(case.real + case.zero, generator=g) * 0.1 if case.biased else None
    return {
        "logits": logits_TE.to(device, case.dtype).requires_grad_(),
        "k": case.k,
        "n_real": case.real,
        "bias": None if bias_E is None else bias_E.to(device),
        "score": case.score,
        "renorm": case.renorm,
        "scale": case.scale,
    }


def cost(case: Case) -> Cost:
    """Logits and bias read once, weights and ids written once; about eight operations a logit for the softmax."""
    experts = case.real + case.zero
    moved = case.tokens * (experts * case.dtype.itemsize + 12 * case.k) + 4 * experts
    return Cost(flops=8 * case.tokens * experts, bytes=moved)


REFUSALS = (
    Refusal("logits must be [T, E] floating point, got torch.float32 [6]", lambda a: {"logits": torch.ones(6)}),
    Refusal("logits must be [T, E] floating point, got torch.int64", lambda a: {"logits": a["logits"].long()}),
    Refusal("k must be between 1 and 6, got 7", lambda a: {"k": 7}),
    Refusal("k must be between 1 and 6, got 0", lambda a: {"k": 0}),
    Refusal("n_real must be between 0 and 6, got 8", lambda a: {"n_real": 8}),
    Refusal("bias must be float32 [6], got torch.float32 [4]", lambda a: {"bias": torch.zeros(4)}),
    Refusal("bias must be float32 [6], got torch.int64 [6]", lambda a: {"bias": torch.zeros(6).long()}),
    Refusal("bias must be float32 [6], got torch.float64 [6]", lambda a: {"bias": torch.zeros(6).double()}),
    Refusal("score must be softmax or sigmoid, got 'relu'", lambda a: {"score": "relu"}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
