"""Fused ops and modules of LongCat-Next for any PyTorch model.

Each op is a torch op (schema, fake kernel, autograd, one graph under `torch.compile`) with several implementations
behind one signature; `backend="auto"` takes the fastest that can.
"""

from __future__ import annotations

from longcat_kernels.ops.ema_update import ema_update
from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import RVQEncoding, rvq_encode

__all__ = [
    "RVQEncoding",
    "ema_update",
    "rvq_decode",
    "rvq_encode",
]
