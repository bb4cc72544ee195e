"""Every op of the library: one file each, named as the op is."""

from __future__ import annotations

from longcat_kernels.ops import (
    depth_decode,
    ema_update,
    fused_moe,
    grouped_mm,
    moe_plan,
    moe_route,
    ngram_embedding,
    rvq_decode,
    rvq_encode,
)

OPS = (
    rvq_encode.OP,
    rvq_decode.OP,
    ema_update.OP,
    grouped_mm.OP,
    moe_route.OP,
    moe_plan.OP,
    fused_moe.OP,
    depth_decode.OP,
    ngram_embedding.OP,
)
