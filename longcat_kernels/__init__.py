"""Fused ops and modules of LongCat-Next for any PyTorch model.

Each op is a torch op (schema, fake kernel, autograd, one graph under `torch.compile`) with several implementations
behind one signature; `backend="auto"` takes the fastest that can.
"""

from __future__ import annotations

from longcat_kernels.ops.rvq_encode import RVQEncoding, rvq_encode

__all__ = [
    "RVQEncoding",
    "rvq_encode",
]
