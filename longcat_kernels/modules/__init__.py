"""`nn.Module`s around the ops; their state dicts are named as in the released checkpoint."""

from __future__ import annotations

from longcat_kernels.modules.residual_vq import ResidualVQ

__all__ = [
    "ResidualVQ",
]
