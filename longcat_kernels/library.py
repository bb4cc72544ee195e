"""The one `torch.library.Library` of the package, and the one way an op enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("longcat", "DEF")


def check(condition: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raises `error(message())` unless `condition`: a plain branch, also on the symbolic shapes of a trace."""
    if not condition:
        raise error(message())


def wants_grad(*arguments: Any) -> bool:
    """Whether autograd has a part in a call: it is on, and a tensor of the arguments or of their lists requires it."""
    return torch.is_grad_enabled() and _requires_grad(arguments)


def once(op: str) -> Callable[..., Any]:
    """The `backward` of the ops that compute gradients of `op`: without one, torch takes second gradients for zero."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op}: gradients must not be differentiated, got a backward pass through them: where second derivatives "
            f"are needed, call the definition in longcat_kernels.reference.{op}"
        )

    return refuse


def register(
    schema: str,
    run: Callable[..., Any],
    allocate: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `longcat::<schema>` and gives what calls it.

    Where the op has a gradient, calls that want none go to `longcat::<name>_inference`, the same op without autograd:
    torch's part of it is Python, which takes longer than the whole dispatch of an op that lacks it.

    Args:
        schema: as `torch.library.Library.define` takes it; integer results last (opcheck adds results up in order).
        run: the kernel, on every device: allocates, then chooses an implementation.
        allocate: checks and outputs only; it is the fake kernel, so that the two cannot disagree.
        save: `save(ctx, inputs, output)` keeps what backward needs.
        backward: `backward(ctx, *grads)` gives one gradient per input. Inputs with tangents are refused where there is
            one, as torch would take the results' tangents for zero.
    """
    name, signature = schema.split("(", 1)
    overload = _define(name, signature, run, allocate)
    if backward is None:
        _set_vmap(name, overload, overload)
        return overload
    torch.library.register_autograd(f"longcat::{name}", backward, setup_context=save, lib=_LIBRARY)
    inference = _define(f"{name}_inference", signature, run, allocate)

    def call(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        return (overload if wants_grad(*arguments) else inference)(*arguments)

    for defined in (overload, inference):
        _set_vmap(name, defined, call)
    return call


def _define(name: str, signature: str, run: Callable[..., Any], allocate: Callable[..., Any]) -> Callable[..., Any]:
    _LIBRARY.define(f"{name}({signature}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longcat::{name}", allocate, lib=_LIBRARY)
    return getattr(torch.ops.longcat, name).default


def _set_vmap(op: str, overload: Any, call: Callable[..., Any]) -> None:
    """Gives an op that writes to none of its inputs its rule under torch.vmap: one call an element, with its gradient.

    Torch's own fallback has no gradient, and takes no optional tensors and no lists.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        pairs = list(zip(arguments, in_dims, strict=True))
        check(info.batch_size > 0, lambda: f"{op}: what torch.vmap batches must not be empty, got 0 elements")
        results = [call(*(_element(value, dim, i) for value, dim in pairs)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    if not overload._schema.is_mutable:
        torch.library.register_vmap(f"longcat::{overload._opname}", rule, lib=_LIBRARY)


def _element(value: Any, dim: Any, i: int) -> Any:
    """Number i of an argument that is batched along `dim`, if it is, or of a list of such."""
    if isinstance(value, (list, tuple)):
        return [_element(*each, i) for each in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)


def _refuse_tangents(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, (list, tuple)):
            _refuse_tangents(name, value)
        elif isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name}: inputs must have no tangents, got a forward-mode derivative: go backward instead, or call "
                f"the definition in longcat_kernels.reference.{name}"
            )


def _requires_grad(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and _requires_grad(value):
            return True
    return False
