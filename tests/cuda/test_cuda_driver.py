"""Bindings, driver calls and launchers of the compiled module itself, on a driver that emulates."""

from __future__ import annotations

import os
import re
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


def test_the_compiled_module_has_nothing_to_wait_or_to_allocate_with() -> None:
    """All that it can call of the driver: once at loading, and for each call what a CUDA graph can capture."""
    loading = "cuInit cuDeviceGetCount cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuModuleLoadData"
    loading += " cuModuleUnload cuModuleGetFunction cuFuncSetAttribute cuGetErrorName cuGetErrorString"
    calling = "cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuLaunchKernelEx cuMemsetD8Async cuTensorMapEncodeTiled"
    table = (emulated.ROOT / "csrc/cuda/driver_api.h").read_text()
    assert set(re.findall(r"\(\*(\w+)\)", table)) == {*loading.split(), *calling.split()}
    sources = [file for folder in ("cpp", "h", "cuh") for file in (emulated.ROOT / "csrc").rglob(f"*.{folder}")]
    assert [file.name for file in sources if re.search(r"\bdl(open|sym)\b", file.read_text())] == ["driver.cpp"]
