"""Top-k routing of tokens to experts, identity experts included (LongCat-Flash, arXiv 2509.01322, section 2.1).

Dimension key
    T tokens    E experts, identity experts included    k experts of one token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import once, register
from longcat_kernels.reference import moe_route as spec
from longcat_kernels.spec import Op

SCORES = ("softmax", "sigmoid")


def moe_route(
    logits: Tensor,
    k: int,
    *,
    n_real: int,
    bias: Tensor | None = None,
    score: str = "softmax",
    renorm: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Chooses k experts a token and gives their weights, in float32, or in float64 of float64 logits.

    The choice is the top k of score(logits) + bias, highest first, ties to the lower id; a weight is the score without
    the bias, divided by the sum over the chosen ones if `renorm`, times `scale`.

    Args:
        logits: [T, E] floating point: real experts first, then identity ("zero") experts.
        k: experts of a token, at most E.
        n_real: how many of the E are real; ids from there on are identity experts to `fused_moe`.
        bias: float32 [E]; takes part in the choice only, gets no gradient.
        score: "softmax" over all E, or "sigmoid".
        backend: "auto" or the name of an implementation.

    Returns:
        weights: [T, k] float32 or float64, gradient to the logits; ids: [T, k] int64.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or no implementation takes the tensors.

    Example:
        >>> weights, ids = moe_route(torch.tensor([[0.0, 2.0, 1.0]]), 2, n_real=2, bias=torch.tensor([0.0, 0.0, 1.0]))
        >>> ids.tolist(), [round(w, 3) for w in weights[0].tolist()]
        ([[2, 1]], [0.245, 0.665])
    """
    return _op(logits, k, n_real, bias, score, renorm, scale, backend)


def _check(logits_TE: Tensor, k: int, n_real: int, bias_E: Tensor | None, score: str) -> None:
    shape, dtype = logits_TE.shape, logits_TE.dtype
    if len(shape) != 2 or not dtype.is_floating_point:
        raise ValueError(f"moe_route: logits must be [T, E] floating point, got {dtype} {list(shape)}")
    experts = shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"moe_route: k must be between 1 and {experts}, got {k}")
    if not 0 <= n_real <= experts:
        raise ValueError(f"moe_route: n_real must be between 0 and {experts}, got {n_real}")
    if score not in SCORES:
        raise ValueError(f"moe_route: score must be {' or '.join(SCORES)}, got {score!r}")
    if bias_E is None:
        return
    found, device = list(bias_E.shape), bias_E.device
    if found != [experts] or bias_E.dtype != torch.float32:
        raise ValueError(f"moe_route: bias must be float32 [{experts}], got {bias_E.dtype} {found}")
    if device != logits_TE.device:
        raise ValueError(f"moe_route: bias must be on {logits_TE.device}, got {device}")


def _allocate(
    logits_TE: Tensor, k: int, n_real: int, bias_E: Tensor | None, score: str, renorm: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check(logits_TE, k, n_real, bias_E, score)
    dtype, rows = torch.promote_types(logits_TE.dtype, torch.float32), logits_TE.shape[0]
    return logits_TE.new_empty(rows, k, dtype=dtype), logits_TE.new_empty(rows, k, dtype=torch.int64)


def _run(
    logits_TE: Tensor, k: int, n_real: int, bias_E: Tensor | None, score: str, renorm: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    inputs = (logits_TE, k, n_real, bias_E, score, renorm, scale)
    outputs = _allocate(*inputs, backend)
    choose("moe_route", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _k, _n_real, _bias, ctx.score, ctx.renorm, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TE, output[1])


def _backward(ctx: Any, grad_Tk: Tensor, _ids: None) -> tuple[Any, ...]:
    logits_TE, ids_Tk = ctx.saved_tensors
    grad_TE = _op_backward(grad_Tk, logits_TE, ids_Tk, ctx.score, ctx.renorm, ctx.scale, ctx.backend)
    return grad_TE, None, None, None, None, None, None, None


def _allocate_backward(
    grad_Tk: Tensor, logits_TE: Tensor, ids_Tk: Tensor, score: str, renorm: bool, scale: float, backend: str
) -> Tensor:
    return torch.empty(logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device)


def _run_backward(*arguments: Any) -> Tensor:
    out_TE = _allocate_backward(*arguments)
    *inputs, backend = arguments
    wanted = backend if backend in IMPLS_BACKWARD else "auto"
    choose("moe_route_backward", IMPLS_BACKWARD, wanted, *inputs).run(*inputs, out_TE)
    return out_TE


_op_backward = register(
    "moe_route_backward(Tensor grad_weights, Tensor logits, Tensor ids, str score, bool renorm, float scale, "
    "str backend) -> Tensor",
    _run_backward,
    _allocate_backward,
    backward=once("moe_route"),
)
_op = register(
    "moe_route(Tensor logits, SymInt k, SymInt n_real, Tensor? bias, str score, bool renorm, float scale, str backend) "
    "-> (Tensor weights, Tensor ids)",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)


def _why_not_cpu(logits_TE: Tensor, *_: Any) -> str | None:
    if not logits_TE.is_cpu:
        return f"takes tensors on the CPU, got {logits_TE.device}"
    if logits_TE.dtype == torch.float64:
        return "routes in float32, got torch.float64"
    return native.why_not()


def _cpu(
    logits_TE: Tensor,
    k: int,
    n_real: int,
    bias_E: Tensor | None,
    score: str,
    renorm: bool,
    scale: float,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
) -> None:
    """Scores by torch, so that they are the reference's to the bit, and with them the choice; the rest in one pass."""
    p_TE = spec.probabilities(logits_TE, score)
    choice_TE = spec.choice(p_TE, bias_E)
    arguments = (p_TE.contiguous(), choice_TE.contiguous(), renorm, scale, weights_Tk, ids_Tk)
    native.module().moe_route(*arguments, threads=torch.get_num_threads())


def _reference_backward(*arguments: Any) -> None:
    *inputs, out_TE = arguments
    out_TE.copy_(spec.backward(*inputs))


IMPLS: dict[str, Impl] = {
    "triton": triton.implementation("moe_route"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": reference(spec.moe_route),
}
IMPLS_BACKWARD: dict[str, Impl] = {
    "triton": triton.implementation("moe_route_backward"),
    "reference": Impl(_reference_backward, lambda *inputs: None),
}
OP = Op("moe_route", moe_route, IMPLS, spec)
