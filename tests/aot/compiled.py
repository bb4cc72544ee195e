"""Compiles Triton kernels as their launchers do, without a driver: what the tests of this folder look at."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton: compiled in a process without TRITON_INTERPRET=1", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Kernel:
    """A kernel as the launcher of `longcat_kernels.triton.<module>` calls it."""

    module: str
    name: str
    types: str  # of the arguments that are not constants; "i32*16" is a multiple of 16
    constants: dict[str, Any]
    options: dict[str, int]


def options(warps: int, stages: int = 3) -> dict[str, int]:
    return {"num_warps": warps, "num_stages": stages}


@dataclass(frozen=True)
class Built:
    """What the compiler made of a kernel."""

    registers: int
    stack: int  # bytes of a thread
    shared: int  # bytes of a program
    ptx: str
    sass: str


def build(kernel: Kernel, arch: int, folder: Path) -> Built:
    function = getattr(importlib.import_module(f"longcat_kernels.triton.{kernel.module}"), kernel.name)
    names = function.arg_names
    types = dict(zip([name for name in names if name not in kernel.constants], kernel.types.split(), strict=False))
    signature = {name: types[name].removesuffix("*16") if name in types else "constexpr" for name in names}
    aligned = [name for name in types if types[name].startswith("*") or types[name].endswith("*16")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {name: value for name, value in kernel.constants.items() if name in names}
    assert len(types) + len(constants) == len(names), f"{kernel.name}: arguments have changed"
    source = ASTSource(function, signature, constants, attributes)
    return look_at(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.options), folder)


def look_at(compiled: Any, folder: Path, sass: bool = True) -> Built:
    """What the compiler gave, by way of a folder for temporary files; to disassemble takes as long as to compile."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    assert found
    code = _tool("nvdisasm", "--no-dataflow", "--print-code", cubin) if sass else ""
    return Built(int(found[1]), int(found[2]), compiled.metadata.shared, compiled.asm["ptx"], code)


def _tool(name: str, *arguments: Any) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


# Instructions that flush to zero inside libdevice, where nothing that small matters: in double exp and log, and in erf.
DOUBLE = frozenset({"abs.ftz.f32", "rcp.approx.ftz.f64"})
ERF = frozenset({"abs.ftz.f32", "fma.rn.ftz.f32", "ex2.approx.ftz.f32"})


def check(kernel: Kernel, arch: int, folder: Path, flushes: frozenset[str] = frozenset()) -> Built:
    built = build(kernel, arch, folder)
    sound(built, f"{kernel.name} sm_{arch} {kernel.constants}", flushes)
    return built


def sound(built: Built, what: str, flushes: frozenset[str] = frozenset()) -> None:
    """Asserts that nothing spills, and that nothing is flushed to zero but where it may be."""
    print(f"{what}: {built.registers} registers, {built.shared} bytes shared")
    assert built.stack == 0 and not re.search(r"\b(LDL|STL)\b", built.sass), f"{built.stack} bytes of stack"
    assert set(re.findall(r"\S*\.ftz\S*", built.ptx)) <= flushes


class Device:
    """What Triton asks of a driver before it compiles; each architecture has a number, for caches are by number."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@dataclass(frozen=True)
class Launch:
    """A launch that a launcher wanted, not yet compiled."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # keywords: constants, warps and stages
    arch: int

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def compile(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "_active", Device(self.arch))
            return self.function.warmup(*self.arguments, grid=(1,), **self.options)


def launches(arch: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[Launch]:
    """What `run`, given tensors on the CPU, would launch on a GPU of this architecture."""
    found: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(self, arguments, options, arch))

    modules = [module for name, module in sys.modules.items() if name.startswith("longcat_kernels.triton.")]
    with monkeypatch.context() as patch:
        for module in modules:
            for name, answer in (("shared_bytes", SHARED_BYTES[arch]), ("has_descriptors", arch >= 90)):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, answer=answer: answer)
        patch.setattr(JITFunction, "run", record)
        run()
    return found
