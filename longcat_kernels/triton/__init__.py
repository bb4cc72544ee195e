"""Triton implementations: for CUDA tensors, and for CPU tensors in Triton's interpreter, where tests run them.

A module here is named as its op and holds the kernels, `run(*inputs, *outputs)` and, where it is choosy, `why_not`. It
imports triton; this one does not, so that the package does without it until an op asks. The interpreter is on where
TRITON_INTERPRET=1 was set before the first such import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.backends import Impl, first_tensor

HOW_TO_GET_IT = "triton is not installed: pip install triton"
NO_INTERPRETER = "takes CUDA tensors, got cpu; set TRITON_INTERPRET=1 before the first use to run in the interpreter"


def implementation(op: str) -> Impl:
    """The implementation in the module `op`, which is imported when it is first asked."""
    return Impl(
        lambda *arguments, **memory: _module(op).run(*arguments, **memory), lambda *inputs: _why_not(op, inputs)
    )


def pack(words: Tensor, packed: Tensor) -> None:
    """Fills `packed`, uint8 of `HalfLayout(K, D).bytes`, from float32 codewords [K, D]."""
    _module("_pack").pack(words, packed)


def on_device(tensor: Tensor) -> bool:
    """Whether Triton's kernels run where the tensor is, at full speed."""
    return tensor.device.type == "cuda" and _installed()


def _why_not(op: str, inputs: tuple[Any, ...]) -> str | None:
    """None where the kernels of `op` can run on these tensors, else the reason."""
    device = first_tensor(inputs).device
    if not _installed():
        return HOW_TO_GET_IT
    if device.type == "cpu" and not _module("_numeric").INTERPRETED:
        return NO_INTERPRETER
    if device.type not in ("cpu", "cuda"):
        return f"takes CUDA tensors, got {device}"
    choosy = getattr(_module(op), "why_not", None)
    return choosy(*inputs) if choosy is not None else None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"longcat_kernels.triton.{name}")


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one while kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
