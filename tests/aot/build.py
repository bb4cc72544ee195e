"""Compiles a Triton kernel ahead of time, without a driver, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Built:
    """What the compiler made of a kernel."""

    registers: int
    stack: int  # bytes of a thread
    shared: int  # bytes of a program
    sass: str

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these names."""
        return len(re.findall(rf"\b(?:{'|'.join(opcodes)})\b", self.sass))


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int) -> Built:
    """The kernel for compute capability `arch`: `types` of its arguments, 16-byte aligned pointers and "i32 16"."""
    names = kernel.arg_names
    signature = {name: types[name].split()[0] if name in types else "constexpr" for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or types.get(n, "").endswith(" 16")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {n: v for n, v in constants.items() if n in names}, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (_tool(*command, file.name) for command in (("nvdisasm",), ("cuobjdump", "-res-usage")))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Built(int(found[1]), int(found[2]), compiled.metadata.shared, sass)


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
