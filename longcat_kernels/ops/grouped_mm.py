"""Grouped matrix product: one product a group, groups of different sizes side by side in one tensor.

Dimension key
    E groups (experts)    R rows of all groups, sorted by group    M, N, K sides of one product
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.deferred import WeightGrads, is_weight
from longcat_kernels.library import check, register
from longcat_kernels.reference import grouped_mm as spec
from longcat_kernels.spec import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies matrices group by group: a superset of `torch.nn.functional.grouped_mm`.

    | a         | b         | out       | ragged dimension, which `offs` divides |
    | [R, K]    | [E, K, N] | [R, N]    | rows of a, rows of out                 |
    | [E, M, K] | [K, R]    | [M, R]    | columns of b, columns of out           |
    | [M, R]    | [R, N]    | [E, M, N] | the one that is summed over            |
    | [E, M, K] | [E, K, N] | [E, M, N] | none                                   |

    Sums are float32, or float64 of float64. On the CPU, where the processor multiplies bfloat16,
    `torch.set_float32_matmul_precision("medium")` lets products of float32, and their gradients, round a and b to
    bfloat16: faster, with relative errors of 2.4e-3 instead of 3e-7.

    Args:
        a, b: one floating dtype, any strides.
        offs: int32 or int64 [E], where each group ends; groups may be empty, what lies past the last end gives zeros
            in `out` and in the gradients. Where it is summed over, a and b may have different lengths.
        bias: must be None, as torch has it.
        out_dtype: must be None or the dtype of a, as torch has it.
        backend: "auto" or the name of an implementation.

    Returns:
        out: the dtype of a; differentiable any number of times.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, offsets decrease or leave the ragged dimension, or no
            implementation takes the tensors. Offsets on a GPU are not waited for: wrong ones give wrong rows, in
            memory that is this op's.

    Example:
        >>> rows, weights = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> grouped_mm(rows, weights, torch.tensor([1, 3])).tolist()
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check(bias is None, lambda: "grouped_mm: bias must be None, got a tensor: add it to the result")
    check(
        out_dtype in (None, a.dtype),
        lambda: f"grouped_mm: out_dtype must be None or {a.dtype} as a is, got {out_dtype}: convert the result",
    )
    if a.ndim == b.ndim == 2 and a.shape[1] != b.shape[0]:
        extent = min(a.shape[1], b.shape[0])
        a, b = a[:, :extent], b[:extent]
    return _op(a, b, offs, backend)


def _check(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    check(
        a.ndim in (2, 3) and b.ndim in (2, 3),
        lambda: f"grouped_mm: a and b must be 2-D or 3-D, got {list(a.shape)} and {list(b.shape)}",
    )
    check(a.dtype.is_floating_point, lambda: f"grouped_mm: a must be floating point, got {a.dtype}")
    check(b.dtype == a.dtype, lambda: f"grouped_mm: b must be {a.dtype} as a is, got {b.dtype}")
    check(b.device == a.device, lambda: f"grouped_mm: b must be on {a.device} as a is, got {b.device}")
    wanted = [*([a.shape[0]] if a.ndim == b.ndim == 3 else b.shape[: b.ndim - 2]), a.shape[-1]]
    check(
        list(b.shape[:-1]) == wanted,
        lambda: f"grouped_mm: b must be [{', '.join(map(str, wanted))}, N] to follow a, got {list(b.shape)}",
    )
    if a.ndim == b.ndim == 3:
        check(offs is None, lambda: "grouped_mm: offs must be None where a and b are 3-D, got a tensor")
        return
    if offs is None:
        raise ValueError("grouped_mm: offs must be given unless a and b are 3-D, got None")
    groups = a.shape[0] if a.ndim == 3 else b.shape[0] if b.ndim == 3 else offs.numel()
    check(
        offs.dtype in (torch.int32, torch.int64) and list(offs.shape) == [groups],
        lambda: f"grouped_mm: offs must be int32 or int64 [{groups}], got {offs.dtype} {list(offs.shape)}",
    )
    check(offs.device == a.device, lambda: f"grouped_mm: offs must be on {a.device} as a is, got {offs.device}")


def _allocate(a: Tensor, b: Tensor, offs: Tensor | None, backend: str) -> Tensor:
    _check(a, b, offs)
    batch = [] if a.ndim + b.ndim == 5 else [offs.shape[0] if offs is not None else a.shape[0]]
    return a.new_empty(*batch, a.shape[-2], b.shape[-1])


def _run(a: Tensor, b: Tensor, offs: Tensor | None, backend: str) -> Tensor:
    out = _allocate(a, b, offs, backend)
    choose("grouped_mm", IMPLS, backend, a, b, offs).run(a, b, offs, out)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offs, ctx.backend = inputs
    ctx.pending = WeightGrads.current()
    ctx.save_for_backward(a, b, offs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Both gradients are grouped products again, each computed only where, and when, it is asked for."""
    a, b, offs = ctx.saved_tensors
    backend, ends = ctx.backend, () if offs is None else (offs,)
    rules: list[Callable[..., list[Tensor]]] = [
        lambda grad, b, offs=None: [_op(grad, b.mT, offs, backend)],
        lambda grad, a, offs=None: [_op(a.mT, grad, offs, backend)],
    ]
    grads: list[Tensor | None] = [None, None]
    for i, (factor, other, rule) in enumerate(zip((a, b), (b, a), rules, strict=True)):
        if ctx.needs_input_grad[i] and ctx.pending is not None and is_weight(factor):
            ctx.pending.add([factor], rule, (grad, other, *ends))
        elif ctx.needs_input_grad[i]:
            (grads[i],) = rule(grad, other, *ends)
    return *grads, None, None


_op = register(
    "grouped_mm(Tensor a, Tensor b, Tensor? offs, str backend) -> Tensor",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)


def _why_not_cpu(a: Tensor, *_: Any) -> str | None:
    if not a.is_cpu:
        return f"takes tensors on the CPU, got {a.device}"
    if a.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {a.dtype}"
    return native.why_not()


def _adjacent(matrix: Tensor) -> Tensor:
    """With adjacent elements in rows or in columns: a copy where neither is so."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


def _cpu(a: Tensor, b: Tensor, offs: Tensor | None, out: Tensor) -> None:
    ends = None if offs is None else offs.long().contiguous()
    native.module().grouped_mm(
        _adjacent(a),
        _adjacent(b),
        ends,
        out,
        threads=torch.get_num_threads(),
        products=native.product_dtype(a.dtype),
    )


IMPLS: dict[str, Impl] = {
    "triton": triton.implementation("grouped_mm"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": reference(spec.grouped_mm),
}
OP = Op("grouped_mm", grouped_mm, IMPLS, spec)
