"""Depth heads: one code a level from one hidden state, each level conditioned on the levels before it."""

from __future__ import annotations

from longcat_kernels.modules import DepthTransformer
from longcat_model import config


def depth_head(hidden: int, sizes: config.DepthHead, codebook_sizes: tuple[int, ...]) -> DepthTransformer:
    """The depth transformer of one modality; its state dict has the released names.

    Args:
        hidden: width of the backbone and of the joint embedding.
        codebook_sizes: codebook entries C_l of each level; the head has C_l + 1 classes, the last one means "end".
    """
    return DepthTransformer(
        hidden=hidden,
        dim=sizes.dim,
        heads=sizes.heads,
        layers=sizes.layers,
        ffn_scale=sizes.ffn_scale,
        sizes=codebook_sizes,
    )
