"""A kernel with a mistake: shows that compute-sanitizer, as gpu_check.py calls it, finds one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def planted(out: torch.Tensor) -> None:
    tl.store(out + 1024, 1.0)


def run() -> None:
    """Writes four kilobytes behind an allocation of sixteen bytes."""
    planted[(1,)](torch.zeros(4, device="cuda"))
    torch.cuda.synchronize()
