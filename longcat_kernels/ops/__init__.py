"""Every op of the library: one file each, named as the op is."""

from __future__ import annotations

from longcat_kernels.ops import ema_update, rvq_decode, rvq_encode

OPS = (
    rvq_encode.OP,
    rvq_decode.OP,
    ema_update.OP,
)
