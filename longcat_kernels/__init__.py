"""Fused ops and modules of LongCat-Next for any PyTorch model.

Each op is a torch op (schema, fake kernel, autograd, one graph under `torch.compile`) with several implementations
behind one signature; `backend="auto"` takes the fastest that can.
"""

from __future__ import annotations

from longcat_kernels.deferred import WeightGrads, defer_weight_grads
from longcat_kernels.ops.depth_decode import depth_decode
from longcat_kernels.ops.ema_update import ema_update
from longcat_kernels.ops.fused_moe import fused_moe
from longcat_kernels.ops.grouped_mm import grouped_mm
from longcat_kernels.ops.moe_plan import RoutingPlan, moe_plan
from longcat_kernels.ops.moe_route import moe_route
from longcat_kernels.ops.ngram_embedding import ngram_embedding
from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import RVQEncoding, rvq_encode
from longcat_kernels.prepared import PreparedCodebook, PreparedDepth, PreparedExperts
from longcat_kernels.reference.depth_decode import DepthDecoding
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights, rope_table
from longcat_kernels.reference.sampling import sample
from longcat_kernels.workspace import Workspace

__all__ = [
    "DepthConfig",
    "DepthDecoding",
    "DepthLayer",
    "DepthSampling",
    "DepthWeights",
    "PreparedCodebook",
    "PreparedDepth",
    "PreparedExperts",
    "RVQEncoding",
    "RoutingPlan",
    "WeightGrads",
    "Workspace",
    "defer_weight_grads",
    "depth_decode",
    "ema_update",
    "fused_moe",
    "grouped_mm",
    "moe_plan",
    "moe_route",
    "ngram_embedding",
    "rope_table",
    "rvq_decode",
    "rvq_encode",
    "sample",
]
