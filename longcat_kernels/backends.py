"""Which implementation of an op runs, and why.

An op's file lists its implementations as a dict in order of preference; `choose` is the only code that reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT = "LONGCAT_BACKEND"  # the package's one environment name: what backend="auto" prefers

# Why "auto" passes over an implementation without asking it (triton's answer may import triton), by where tensors are.
_ON_ACCELERATOR = {"reference": 'runs on an accelerator only when asked for: backend="reference"'}
_ON_CPU = {
    "cuda": "takes CUDA tensors, got tensors on the CPU",
    "triton": 'runs on the CPU, in its interpreter, only when asked for: backend="triton"',
}


@dataclass(frozen=True)
class Impl:
    """One implementation.

    `run(*inputs, *outputs)` fills preallocated outputs and returns nothing; `why_not(*inputs)` gives None, or the
    reason why it cannot take these inputs. Where an op has a workspace, `run` is also given `new`, which gives memory.
    """

    run: Callable[..., None]
    why_not: Callable[..., str | None]


def reference(function: Callable[..., tuple[Tensor, ...]]) -> Impl:
    """The implementation that is the definition itself: computes `function(*inputs)` and copies into the outputs."""
    return Impl(lambda *arguments, **memory: _copy_results(function, arguments), lambda *inputs: None)


def choose(op: str, impls: dict[str, Impl], backend: str, *inputs: Any) -> Impl:
    """Gives the first implementation, in the op's own order, that takes `inputs`; the first tensor says where they are.

    With "auto" the name in LONGCAT_BACKEND, where the op has one of that name, replaces the order; what would be slow
    without a word runs only when asked for by name: the reference on an accelerator, Triton's interpreter on the CPU.

    Raises:
        ValueError: no such backend, or none takes the inputs; lists why each was refused.
    """
    wanted = _wanted(op, impls, backend)
    passed_over: dict[str, str] = {}
    if wanted != "auto":
        impls = {wanted: impls[wanted]}
    else:
        passed_over = _ON_CPU if first_tensor(inputs).is_cpu else _ON_ACCELERATOR
    for name, impl in impls.items():
        if name not in passed_over and impl.why_not(*inputs) is None:
            return impl
    refused = {name: passed_over.get(name) or impl.why_not(*inputs) for name, impl in impls.items()}
    raise ValueError(f"{op}: no backend takes these tensors:" + "".join(f"\n  {n}: {r}" for n, r in refused.items()))


def _wanted(op: str, impls: dict[str, Impl], backend: str) -> str:
    if backend != "auto":
        if backend not in impls:
            raise ValueError(f"{op}: backend must be one of {', '.join(['auto', *impls])}, got {backend!r}")
        return backend
    preferred = os.environ.get(ENVIRONMENT, "auto")
    if preferred not in ("auto", *NAMES):
        raise ValueError(f"{op}: {ENVIRONMENT} must be one of {', '.join(['auto', *NAMES])}, got {preferred!r}")
    return preferred if preferred in impls else "auto"


def first_tensor(values: Iterable[Any]) -> Tensor:
    """The first tensor among `values` and at the head of the lists and tuples among them."""
    for value in values:
        head = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(head, Tensor):
            return head
    raise TypeError("an op must have a tensor among its inputs")


def _copy_results(function: Callable[..., tuple[Tensor, ...]], arguments: tuple[Any, ...]) -> None:
    """Calls `function` with all arguments but the outputs: a definition returns as many tensors as it has outputs."""
    inputs = arguments[: function.__code__.co_argcount]
    with torch.no_grad():
        for output, result in zip(arguments[len(inputs) :], function(*inputs), strict=True):
            output.copy_(result)
