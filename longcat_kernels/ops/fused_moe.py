"""Mixture of SwiGLU and identity experts, from ids to sum (LongCat-Flash, arXiv 2509.01322, section 2.1).

The input pass and the weight pass of backward are ops of their own: the weight pass runs only where a weight wants a
gradient, and both use the pre-activations that forward saved.

Dimension key
    T tokens    k slots of a token    R rows: T * k, those of real experts first, sorted by expert    E real experts
    D model     F hidden units of an expert
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels.backends import Impl, choose
from longcat_kernels.library import check, register
from longcat_kernels.reference import fused_moe as spec
from longcat_kernels.spec import Op


def fused_moe(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sums, for each token, its experts' outputs by weight.

    Expert e is down[e] @ (silu(gate) * up) with gate | up = gate_up[e] @ x.

    Args:
        x: [T, D], floating point.
        gate_up: [E, 2 F, D] of x's dtype: the rows of gate, then those of up.
        down: [E, D, F] of x's dtype.
        ids: int64 [T, k] as `moe_route` gives them: in [0, E) a real expert, from E on the identity (adds weight * x),
            negative nothing.
        weights: [T, k] floating point, of any dtype.
        backend: "auto" or the name of an implementation.

    Returns:
        out: [T, D] of x's dtype, summed in at least float32; gradients to x, gate_up, down and weights, once
            differentiable. Backward keeps x and, in at least float32, the pre-activations of the real experts' rows.

    Raises:
        ValueError: a shape, dtype or device is wrong, or no implementation takes the tensors.

    Example:
        >>> x, gate_up, down = torch.ones(1, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 1)
        >>> fused_moe(x, gate_up, down, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.5]]))
        tensor([[4.0232, 4.0232]])
    """
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights))
    return _op(x, gate_up, down, ids, weights, wants_grad, backend)[0]


def _check(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> None:
    check(x_TD.ndim == 2, lambda: f"fused_moe: x must be [T, D], got {list(x_TD.shape)}")
    check(x_TD.dtype.is_floating_point, lambda: f"fused_moe: x must be floating point, got {x_TD.dtype}")
    (rows, dim), found = x_TD.shape, list(gate_up_EFD.shape)
    check(
        len(found) == 3 and found[0] >= 1 and found[1] % 2 == 0 and found[2] == dim,
        lambda: f"fused_moe: gate_up must be [E, 2 F, {dim}] with E >= 1, got {found}",
    )
    wanted = [found[0], dim, found[1] // 2]
    check(list(down_EDF.shape) == wanted, lambda: f"fused_moe: down must be {wanted}, got {list(down_EDF.shape)}")
    check(
        ids_Tk.ndim == 2 and ids_Tk.shape[0] == rows and ids_Tk.shape[1] >= 1 and ids_Tk.dtype == torch.int64,
        lambda: f"fused_moe: ids must be int64 [{rows}, k] with k >= 1, got {ids_Tk.dtype} {list(ids_Tk.shape)}",
    )
    check(
        weights_Tk.shape == ids_Tk.shape and weights_Tk.dtype.is_floating_point,
        lambda: (
            f"fused_moe: weights must be floating point {list(ids_Tk.shape)}, "
            f"got {weights_Tk.dtype} {list(weights_Tk.shape)}"
        ),
    )
    for name, tensor in (("gate_up", gate_up_EFD), ("down", down_EDF)):
        _check_same("dtype", name, tensor.dtype, x_TD.dtype)
    for name, tensor in (("gate_up", gate_up_EFD), ("down", down_EDF), ("ids", ids_Tk), ("weights", weights_Tk)):
        _check_same("device", name, tensor.device, x_TD.device)


def _check_same(what: str, name: str, found: Any, wanted: Any) -> None:
    check(found == wanted, lambda: f"fused_moe: {name} must have the {what} of x, {wanted}, got {found}")


def _allocate(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    _check(x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk)
    rows = ids_Tk.shape[0] * ids_Tk.shape[1] if save else 0
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    hidden_RF = torch.empty(rows, gate_up_EFD.shape[1], dtype=wide, device=x_TD.device)
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device), hidden_RF


def _run(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    inputs = (x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, save)
    outputs = _allocate(*inputs, backend)
    choose("fused_moe", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, _save_hidden, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, output[1])


def _backward(ctx: Any, grad_TD: Tensor, _hidden: None) -> tuple[Any, ...]:
    x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, hidden_RF = ctx.saved_tensors
    grad_x, grad_weights, grad_hidden = _op_input_grad(
        grad_TD, x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, hidden_RF, ctx.backend
    )
    grad_gate_up = grad_down = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_gate_up, grad_down = _op_weight_grad(
            grad_TD, x_TD, ids_Tk, weights_Tk, hidden_RF, grad_hidden, gate_up_EFD.shape[0], ctx.backend
        )
    return grad_x, grad_gate_up, grad_down, None, grad_weights, None, None


def _allocate_input_grad(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    hidden_RF: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return like(x_TD), like(weights_Tk), like(hidden_RF)


def _run_input_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_input_grad(*arguments)
    *inputs, backend = arguments
    choose("fused_moe_input_grad", IMPLS_INPUT_GRAD, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _allocate_weight_grad(
    grad_TD: Tensor,
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    hidden_RF: Tensor,
    grad_hidden_RF: Tensor,
    experts: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    width, dim = hidden_RF.shape[1], x_TD.shape[1]
    grad_gate_up_EFD = torch.empty(experts, width, dim, dtype=x_TD.dtype, device=x_TD.device)
    return grad_gate_up_EFD, torch.empty(experts, dim, width // 2, dtype=x_TD.dtype, device=x_TD.device)


def _run_weight_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = _allocate_weight_grad(*arguments)
    *inputs, backend = arguments
    choose("fused_moe_weight_grad", IMPLS_WEIGHT_GRAD, backend, *inputs).run(*inputs, *outputs)
    return outputs


_op_input_grad = register(
    "fused_moe_input_grad(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor hidden, str backend) -> (Tensor grad_x, Tensor grad_weights, Tensor grad_hidden)",
    _run_input_grad,
    _allocate_input_grad,
)
_op_weight_grad = register(
    "fused_moe_weight_grad(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor hidden, Tensor grad_hidden, "
    "SymInt experts, str backend) -> (Tensor grad_gate_up, Tensor grad_down)",
    _run_weight_grad,
    _allocate_weight_grad,
)
_op = register(
    "fused_moe(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, bool save, str backend) "
    "-> (Tensor out, Tensor hidden)",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)

IMPLS: dict[str, Impl] = {
    "reference": Impl(spec.forward, lambda *inputs: None),
}
IMPLS_INPUT_GRAD: dict[str, Impl] = {
    "reference": Impl(spec.input_grad, lambda *inputs: None),
}
IMPLS_WEIGHT_GRAD: dict[str, Impl] = {
    "reference": Impl(spec.weight_grad, lambda *inputs: None),
}
OP = Op("fused_moe", fused_moe, IMPLS, spec)
