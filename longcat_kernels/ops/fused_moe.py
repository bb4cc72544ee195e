"""Mixture of SwiGLU and identity experts, from ids to sum (LongCat-Flash, arXiv 2509.01322, section 2.1).

Dimension key
    T tokens    k slots of a token    R rows: the slots of real experts, sorted by expert    E real experts
    D model     F hidden units of an expert
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native, triton
from longcat_kernels.backends import Impl, choose
from longcat_kernels.deferred import WeightGrads
from longcat_kernels.library import check, once, register, wants_grad
from longcat_kernels.ops._fused_moe_backward import add_weight_grad, adjacent, input_grad, weight_grad, why_not_cpu
from longcat_kernels.prepared import PreparedExperts
from longcat_kernels.reference import fused_moe as spec
from longcat_kernels.spec import Op

SAVES = ("h", "x")


def fused_moe(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    residual: Tensor | None = None,
    save: str = "h",
    main_grads: tuple[Tensor, Tensor] | None = None,
    prepared: PreparedExperts | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sums, for each token, its experts' outputs by weight.

    Expert e is down[e] @ (silu(gate) * up) with gate | up = gate_up[e] @ x. Sums are float32, slot after slot; on the
    CPU what a token gets depends on no other token and not on the number of threads, to the last bit. There, where the
    processor multiplies bfloat16, `torch.set_float32_matmul_precision("medium")` lets the products of float32 experts,
    forward and backward, round their operands to bfloat16: faster, with relative errors of 4e-3 instead of 1e-6.

    Args:
        x: [T, D], floating point.
        gate_up: [E, 2 F, D] of x's dtype: the rows of gate, then those of up.
        down: [E, D, F] of x's dtype.
        ids: int64 [T, k] as `moe_route` gives them: in [0, E) a real expert, from E on the identity (adds weight * x),
            negative nothing.
        weights: [T, k] floating point, of any dtype.
        residual: [T, D] of x's dtype, added to the sum before it is rounded.
        save: what backward keeps besides its inputs: "h" the pre-activations of the real experts' rows in x's dtype
            (on the CPU as many rows as there are; elsewhere, and inside `torch.compile`, T * k), "x" nothing, and
            computes them again. Inside `torch.vmap` it is "x", whatever is asked for.
        main_grads: contiguous float32 [E, 2 F, D] and [E, D, F]: backward adds the gradients of gate_up and down to
            these, and gives none to gate_up and down themselves. Not inside `torch.compile`.
        prepared: the packed form of these very weights, for inference: spares every call the packing.
        backend: "auto" or the name of an implementation.

    Returns:
        out: [T, D] of x's dtype; gradients to x, gate_up, down, weights and residual, once differentiable.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or no implementation takes the tensors.

    Example:
        >>> x, gate_up, down = torch.ones(1, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 1)
        >>> fused_moe(x, gate_up, down, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.5]]))
        tensor([[4.0232, 4.0232]])
    """
    check(save in SAVES, lambda: f"fused_moe: save must be {' or '.join(SAVES)}, got {save!r}")
    main_gate_up, main_down = main_grads or (None, None)
    packed = _packed(prepared, gate_up, down)
    arguments = (x, gate_up, down, ids, weights, residual, main_gate_up, main_down, packed)
    if not wants_grad(x, gate_up, down, weights, residual):
        return _op(*arguments, 0, True, backend)[0]
    return _op(*arguments, _saved_rows(ids, down), save == "x", backend)[0]


def _saved_rows(ids_Tk: Tensor, down_EDF: Tensor) -> int:
    """How many rows backward needs: all slots where their number would cost a wait, or cannot be known."""
    if torch.compiler.is_compiling() or not ids_Tk.is_cpu or down_EDF.ndim != 3:
        return ids_Tk.numel()
    return int(((ids_Tk >= 0) & (ids_Tk < down_EDF.shape[0])).sum())


def _packed(prepared: PreparedExperts | None, gate_up: Tensor, down: Tensor) -> list[Tensor]:
    if prepared is None or torch.compiler.is_compiling():  # a trace cannot tell whether weights have changed
        return []
    check(
        prepared.gate_up is gate_up and prepared.down is down,
        lambda: "fused_moe: prepared must be made of gate_up and down, got one made of other tensors",
    )
    return prepared.refresh().packed


def check_experts(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> None:
    """Raises ValueError unless these fit each other."""
    x, gate_up, down, ids, weights = (t.shape for t in (x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk))
    check(len(x) == 2, lambda: f"fused_moe: x must be [T, D], got {list(x)}")
    check(x_TD.dtype.is_floating_point, lambda: f"fused_moe: x must be floating point, got {x_TD.dtype}")
    check(
        len(gate_up) == 3 and gate_up[0] >= 1 and gate_up[1] % 2 == 0 and gate_up[2] == x[1],
        lambda: f"fused_moe: gate_up must be [E, 2 F, {x[1]}] with E >= 1, got {list(gate_up)}",
    )
    wanted = (gate_up[0], x[1], gate_up[1] // 2)
    check(down == wanted, lambda: f"fused_moe: down must be {list(wanted)}, got {list(down)}")
    check(
        len(ids) == 2 and ids[0] == x[0] and ids[1] >= 1 and ids_Tk.dtype == torch.int64,
        lambda: f"fused_moe: ids must be int64 [{x[0]}, k] with k >= 1, got {ids_Tk.dtype} {list(ids)}",
    )
    check(
        weights == ids and weights_Tk.dtype.is_floating_point,
        lambda: f"fused_moe: weights must be floating point {list(ids)}, got {weights_Tk.dtype} {list(weights)}",
    )
    dtype, device = x_TD.dtype, x_TD.device
    for name, tensor in (("gate_up", gate_up_EFD), ("down", down_EDF)):
        _check_same("dtype", name, tensor.dtype, dtype)
    for name, tensor in (("gate_up", gate_up_EFD), ("down", down_EDF), ("ids", ids_Tk), ("weights", weights_Tk)):
        _check_same("device", name, tensor.device, device)


def _check_optional(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, residual_TD: Tensor | None, *main: Tensor | None
) -> None:
    _check_like("residual", residual_TD, x_TD, x_TD.dtype)
    if (main[0] is None) != (main[1] is None):
        raise ValueError("fused_moe: main_grads must be a pair of tensors, got one and None: leave out both or none")
    _check_like("main_grads", main[0], gate_up_EFD, torch.float32)
    _check_like("main_grads", main[1], down_EDF, torch.float32)
    for tensor in main:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"fused_moe: main_grads must be contiguous, got strides {tensor.stride()}")


def _check_like(name: str, tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> None:
    if tensor is not None:
        wanted, found = f"{dtype} {list(like.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        check(wanted == found, lambda: f"fused_moe: {name} must be {wanted}, got {found}")
        _check_same("device", name, tensor.device, like.device)


def _check_same(what: str, name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"fused_moe: {name} must have the {what} of x, {wanted}, got {found}")


def _allocate(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_experts(x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk)
    _check_optional(x_TD, gate_up_EFD, down_EDF, residual_TD, main_gate_up, main_down)
    hidden_RF = x_TD.new_empty(0 if recompute else rows, gate_up_EFD.shape[1])
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), hidden_RF


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = _allocate(*arguments)
    *inputs, backend = arguments
    choose("fused_moe", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _allocate_hidden(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids: Tensor, rows: int, backend: str
) -> Tensor:
    return x_TD.new_empty(rows, gate_up_EFD.shape[1])


def _run_hidden(*arguments: Any) -> Tensor:
    hidden_RF = _allocate_hidden(*arguments)
    *inputs, backend = arguments
    choose("fused_moe_hidden", IMPLS_HIDDEN, backend, *inputs).run(*inputs, hidden_RF)
    return hidden_RF


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, _residual, *main, _packed, _rows, ctx.recompute, _ = inputs
    # Main gradients change between forward and backward as they should: no saved tensors, which may not.
    ctx.main, ctx.backend, ctx.packed, ctx.pending = main, inputs[-1], len(_packed), WeightGrads.current()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, *([] if ctx.recompute else [output[1]]))


def _backward(ctx: Any, grad_TD: Tensor, _hidden: None) -> tuple[Any, ...]:
    x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, *saved = ctx.saved_tensors
    if saved:
        (hidden_RF,) = saved
    else:
        hidden_RF = _op_hidden(x_TD, gate_up_EFD, down_EDF, ids_Tk, _saved_rows(ids_Tk, down_EDF), ctx.backend)
    grad_x, grad_weights, grad_hidden = input_grad(
        grad_TD, x_TD, gate_up_EFD, down_EDF, ids_Tk, weights_Tk, hidden_RF, ctx.backend
    )
    rows = (grad_TD, x_TD, ids_Tk, weights_Tk, hidden_RF, grad_hidden)
    rule = (gate_up_EFD.shape[0], ctx.needs_input_grad[1:3], ctx.main, ctx.backend)
    if ctx.pending is None:
        grad_gate_up, grad_down = _weight_grads(rows, *rule)
    else:
        grad_gate_up = grad_down = None
        ctx.pending.add((gate_up_EFD, down_EDF), lambda *rows: _weight_grads(rows, *rule), rows)
    grad_residual = grad_TD if ctx.needs_input_grad[5] else None
    nothing = (None, None, [None] * ctx.packed, None, None, None)
    return grad_x, grad_gate_up, grad_down, None, grad_weights, grad_residual, *nothing


def _weight_grads(
    rows: tuple[Tensor, ...], experts: int, wanted: tuple[bool, bool], main: list[Tensor | None], backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gate_up and down where wanted; None where they were added to `main`."""
    if any(wanted) and main[0] is not None:
        add_weight_grad(*rows, *(m if wants else None for m, wants in zip(main, wanted, strict=True)), backend)
    elif any(wanted):
        grads = weight_grad(*rows, experts, *wanted, backend)
        return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None
    return None, None


_op_hidden = register(
    "fused_moe_hidden(Tensor x, Tensor gate_up, Tensor down, Tensor ids, SymInt rows, str backend) -> Tensor",
    _run_hidden,
    _allocate_hidden,
    backward=once("fused_moe"),
)
_SCHEMA = (
    "(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, Tensor? residual, Tensor? main_gate_up, "
    "Tensor? main_down, Tensor[] packed, SymInt rows, bool recompute, str backend) -> (Tensor out, Tensor hidden)"
)
_op = register(f"fused_moe{_SCHEMA}", _run, _allocate, save=_save, backward=_backward)


def _cpu(
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
    native.module().fused_moe(
        *adjacent(x_TD, gate_up_EFD, down_EDF),
        ids_Tk.contiguous(),
        weights_Tk.float().contiguous(),
        None if residual_TD is None else adjacent(residual_TD)[0],
        packed,
        out_TD,
        hidden_RF if len(hidden_RF) else None,
        threads=torch.get_num_threads(),
        products=native.product_dtype(x_TD.dtype),
    )


def _cpu_hidden(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, rows: int, hidden_RF: Tensor
) -> None:
    weights_Tk = torch.empty(ids_Tk.shape)  # nobody reads them
    native.module().fused_moe(
        *adjacent(x_TD, gate_up_EFD, down_EDF),
        ids_Tk.contiguous(),
        weights_Tk,
        None,
        [],
        None,
        hidden_RF,
        threads=torch.get_num_threads(),
        products=native.product_dtype(x_TD.dtype),
    )


IMPLS: dict[str, Impl] = {
    "triton": triton.implementation("fused_moe"),
    "cpu": Impl(_cpu, why_not_cpu),
    "reference": Impl(spec.forward, lambda *inputs: None),
}
IMPLS_HIDDEN: dict[str, Impl] = {
    "triton": triton.implementation("fused_moe_hidden"),
    "cpu": Impl(_cpu_hidden, why_not_cpu),
    "reference": Impl(spec.hidden, lambda *inputs: None),
}
OP = Op("fused_moe", fused_moe, IMPLS, spec)
