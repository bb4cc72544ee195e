"""The compiled module `longcat_kernels._C`: loaded when first asked for, or the reason why it is not there."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch  # before _C: torch brings the OpenMP runtime that both must share

HOW_TO_GET_IT = "install a C++17 compiler (g++ or clang++), then reinstall longcat-kernels"


def why_not() -> str | None:
    """None where the compiled module is loaded, else the reason and what to do; warns once a process."""
    return _load()[1]


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"longcat_kernels: {reason}")
    return loaded


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What operands are rounded to in matrix products: where torch's setting is "medium", float32 to bfloat16.

    That is what torch's documentation lets "medium" do. torch's own products on the CPU do not do it without AMX: they
    change to oneDNN's float32 kernels, on AMD twice as fast as those of MKL, and stay exact to 4e-7. Kernels here have
    nothing faster in float32, and take the permission where the processor multiplies bfloat16: errors of 2.4e-3 a
    product, at twice the speed. Whoever wants exact products leaves the setting at "highest", the default.
    """
    medium = dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return torch.bfloat16 if medium else dtype


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("longcat_kernels._C"), None
    except ImportError as error:
        reason = f"the compiled module is missing ({error}): {HOW_TO_GET_IT}"
        warnings.warn(f"longcat_kernels: {reason}; until then the slower reference implementations run", stacklevel=2)
        return None, reason
