"""The one `torch.library.Library` of the package, and the one way an op enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("longcat", "DEF")


def check(condition: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raises `error(message())` unless `condition`: a plain branch, also on the symbolic shapes of a trace."""
    if not condition:
        raise error(message())


def wants_grad(*inputs: Tensor | None) -> bool:
    """Whether autograd has a part in a call of these inputs: without one, an op that lacks it is quicker to call."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


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
    """Defines `longcat::<schema>` and gives its overload.

    Args:
        schema: as `torch.library.Library.define` takes it; integer results last (opcheck adds results up in order).
        run: the kernel, on every device: allocates, then chooses an implementation.
        allocate: checks and outputs only; it is the fake kernel, so that the two cannot disagree.
        save: `save(ctx, inputs, output)` keeps what backward needs.
        backward: `backward(ctx, *grads)` gives one gradient per input.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longcat::{name}", allocate, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"longcat::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.longcat, name).default
