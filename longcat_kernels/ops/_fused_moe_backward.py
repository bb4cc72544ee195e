"""The backward passes of `fused_moe`, an op each: the input pass, and the weight pass, which writes or adds.

Both use the pre-activations that forward saved; the weight pass also the gradients that the input pass gave them.

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
from longcat_kernels.library import once, register
from longcat_kernels.reference import fused_moe as spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_cpu(x: Tensor, *_: Any) -> str | None:
    """Why the kernels of `fused_moe` cannot take these tensors, or None."""
    if not x.is_cpu:
        return f"takes tensors on the CPU, got {x.device}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.why_not()


def adjacent(*tensors: Tensor) -> list[Tensor]:
    """Each with adjacent elements along its last axis: a copy where it has not."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


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
    return _like(x_TD), _like(weights_Tk), _like(hidden_RF)


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
    wants_gate_up: bool,
    wants_down: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    width, dim = hidden_RF.shape[1], x_TD.shape[1]
    shapes = ([experts, width, dim] if wants_gate_up else [0], [experts, dim, width // 2] if wants_down else [0])
    grad_gate_up, grad_down = (torch.empty(shape, dtype=x_TD.dtype, device=x_TD.device) for shape in shapes)
    return grad_gate_up, grad_down


def _run_weight_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = _allocate_weight_grad(*arguments)
    *inputs, _experts, wants_gate_up, wants_down, backend = arguments
    grad_gate_up, grad_down = outputs
    impl = choose("fused_moe_weight_grad", IMPLS_WEIGHT_GRAD, backend, *inputs)
    impl.run(*inputs, False, grad_gate_up if wants_gate_up else None, grad_down if wants_down else None)
    return outputs


def _run_add_weight_grad(*arguments: Any) -> None:
    *inputs, grad_gate_up, grad_down, backend = arguments
    impl = choose("fused_moe_add_weight_grad", IMPLS_WEIGHT_GRAD, backend, *inputs)
    impl.run(*inputs, True, grad_gate_up, grad_down)


input_grad = register(
    "fused_moe_input_grad(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor hidden, str backend) -> (Tensor grad_x, Tensor grad_weights, Tensor grad_hidden)",
    _run_input_grad,
    _allocate_input_grad,
    backward=once("fused_moe"),
)
weight_grad = register(
    "fused_moe_weight_grad(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor hidden, Tensor grad_hidden, "
    "SymInt experts, bool wants_gate_up, bool wants_down, str backend) -> (Tensor grad_gate_up, Tensor grad_down)",
    _run_weight_grad,
    _allocate_weight_grad,
    backward=once("fused_moe"),
)
add_weight_grad = register(
    "fused_moe_add_weight_grad(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor hidden, Tensor grad_hidden, "
    "Tensor(a!)? grad_gate_up, Tensor(b!)? grad_down, str backend) -> ()",
    _run_add_weight_grad,
    lambda *arguments: None,
)


def _cpu_input_grad(
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
    in_float = grad_weights_Tk if grad_weights_Tk.dtype == torch.float32 else torch.empty(grad_weights_Tk.shape)
    native.module().fused_moe_input_grad(
        *adjacent(grad_TD, x_TD, gate_up_EFD, down_EDF),
        ids_Tk.contiguous(),
        weights_Tk.float().contiguous(),
        hidden_RF,
        grad_x_TD,
        in_float,
        grad_hidden_RF,
        threads=torch.get_num_threads(),
        products=native.product_dtype(x_TD.dtype),
    )
    if in_float is not grad_weights_Tk:
        grad_weights_Tk.copy_(in_float)


def _cpu_weight_grad(
    grad_TD: Tensor,
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    hidden_RF: Tensor,
    grad_hidden_RF: Tensor,
    add: bool,
    grad_gate_up_EFD: Tensor | None,
    grad_down_EDF: Tensor | None,
) -> None:
    native.module().fused_moe_weight_grad(
        *adjacent(grad_TD, x_TD),
        ids_Tk.contiguous(),
        weights_Tk.float().contiguous(),
        hidden_RF,
        grad_hidden_RF,
        grad_gate_up_EFD,
        grad_down_EDF,
        add,
        threads=torch.get_num_threads(),
        products=native.product_dtype(x_TD.dtype),
    )


IMPLS_INPUT_GRAD: dict[str, Impl] = {
    "triton": triton.implementation("fused_moe_input_grad"),
    "cpu": Impl(_cpu_input_grad, why_not_cpu),
    "reference": Impl(spec.input_grad, lambda *inputs: None),
}
IMPLS_WEIGHT_GRAD: dict[str, Impl] = {
    "triton": triton.implementation("fused_moe_weight_grad"),
    "cpu": Impl(_cpu_weight_grad, why_not_cpu),
    "reference": Impl(spec.weight_grad, lambda *inputs: None),
}
