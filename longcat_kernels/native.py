"""The compiled module `longcat_kernels._C`: loaded when first asked for, or the reason why it is not there."""

from __future__ import annotations

import functools
import hashlib
import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch  # before _C: torch brings the OpenMP runtime that both must share

HOW_TO_GET_IT = "install a C++17 compiler (g++ or clang++), then reinstall longcat-kernels"
HOW_TO_RENEW_IT = "run `python setup.py build_ext --inplace`, or `pip install -e .`, beside setup.py"
SOURCES = Path(__file__).parent.parent / "csrc"  # of a checkout; an installed package has none


def why_not() -> str | None:
    """None where the compiled module is loaded, else the reason and what to do; warns once a process.

    Raises:
        RuntimeError: it was built from other sources than those beside it.
    """
    return _load()[1]


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there, or was built from other sources than those beside it.
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


def source_hash() -> str:
    """Of all that the module is compiled from; CMakeLists.txt computes the same and the module keeps it."""
    files = {f.relative_to(SOURCES.parent).as_posix(): f for kind in ("*.cpp", "*.h") for f in SOURCES.rglob(kind)}
    lines = [f"{name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        loaded = importlib.import_module("longcat_kernels._C")
    except ImportError as error:
        reason = f"the compiled module is missing ({error}): {HOW_TO_GET_IT}"
        warnings.warn(f"longcat_kernels: {reason}; until then the slower reference implementations run", stacklevel=2)
        return None, reason
    info = loaded.build_info()
    if SOURCES.is_dir() and info.get("sources") != source_hash():
        raise RuntimeError(
            f"longcat_kernels: the compiled module must be built from the sources in {SOURCES.name}, got one of others "
            f"(commit {info['commit'] or 'unknown'}): {HOW_TO_RENEW_IT}"
        )
    return loaded, None
