"""Definitions, their inputs and gpu-check's training run on a device that is not the CPU, emulated in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from longcat_kernels.ops import OPS

ROOT = Path(__file__).parent.parent.parent
ABSENT = ("hypothesis", "tyro", "moshi", "vector_quantize_pytorch", "faiss", "librosa", "soundfile", "espeakng_loader")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="emulated device: this torch cannot have devices in Python",
)
def test_nothing_mixes_up_devices_or_needs_what_a_gpu_machine_lacks() -> None:
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        "LONGCAT_BACKEND": "reference",
    }
    script = Path(__file__).with_name("on_emulated_device.py")
    run = subprocess.run(
        [sys.executable, str(script), *ABSENT], env=settings, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[: len(OPS)] == [op.name for op in OPS]
    assert any(line.startswith("first loss ") for line in lines)
