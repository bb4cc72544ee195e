"""`nn.Module`s around the ops; their state dicts are named as in the released checkpoint."""

from __future__ import annotations

from longcat_kernels.modules._depth_logits import depth_logits
from longcat_kernels.modules.depth_transformer import DepthTransformer
from longcat_kernels.modules.expert_parallel import ExpertParallel
from longcat_kernels.modules.moe import MoE, Routed
from longcat_kernels.modules.ngram_embedding import NGramEmbedding
from longcat_kernels.modules.residual_vq import ResidualVQ

__all__ = [
    "DepthTransformer",
    "ExpertParallel",
    "MoE",
    "NGramEmbedding",
    "ResidualVQ",
    "Routed",
    "depth_logits",
]
