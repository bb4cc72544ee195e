"""Bindings, driver calls and launchers of the compiled module itself, on a driver that emulates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from longcat_kernels import native
from longcat_kernels.ops import OPS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA driver: emulated on Linux only")
@pytest.mark.skipif(emulated.compiler() is None, reason="CUDA emulation: no C++ compiler")
def test_the_compiled_module_on_an_emulated_driver(tmp_path: Path) -> None:
    sources = ("tests/cuda/driver/libcuda.cpp", "tests/cuda/emulation.cpp")
    folders = ("-Icsrc", "-Icsrc/include", "-Itests/cuda")
    command = [emulated.compiler() or "", *emulated.FLAGS, *folders, *sources, "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(tmp_path / "libcuda.so.1")], check=True, cwd=emulated.ROOT)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": str(emulated.ROOT),
    }
    script = Path(__file__).parent / "on_fake_driver.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "all as it should be\n", run.stderr[-3000:]


@pytest.mark.skipif(native.why_not() is not None, reason="CUDA driver: the compiled module is missing")
def test_on_the_cpu_the_reason_is_the_device() -> None:
    for op in OPS:
        if "cuda" in op.impls:
            arguments = op.spec.inputs(op.spec.EDGE[-1])
            with pytest.raises(ValueError, match="cuda: takes tensors on a CUDA device, got cpu"):
                op.run(**arguments, backend="cuda")
