"""Semantic-and-aligned encoder (SAE): the Qwen2.5-VL vision tower over packed images, at any size.

The modules are transformers' own, so its state dict loads unchanged; the forward here runs them over segments grouped
by length, where the original loops over windows. The tower's merger (RMSNorm, merge of 2 x 2 patches, MLP) has the
shape of the released bridge and gives one feature vector a position.

Dimension key
    T patches    M positions (T / merge^2)    D tower width    Z bridge width    P numbers of a patch
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from longcat_model import config
from longcat_model.tokenizers.vision.packing import Layout, Segments, attend, rotary

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
ROPE_THETA = 1e4


class Features(NamedTuple):
    hidden: tuple[Tensor, ...]  # after each block, [T, D]
    bridged: Tensor  # [M, Z], z_p of equation (2)


class Encoder(nn.Module):
    """E_sae: packed patches of RGB in [0, 1] to continuous features, one vector a position."""

    def __init__(self, sizes: config.VisionEncoder) -> None:
        super().__init__()
        self.sizes = sizes
        self.visual_model = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                depth=sizes.depth,
                hidden_size=sizes.width,
                intermediate_size=sizes.mlp_width,
                num_heads=sizes.heads,
                patch_size=sizes.patch,
                spatial_merge_size=sizes.merge,
                temporal_patch_size=sizes.temporal_patch,
                window_size=sizes.window,
                out_hidden_size=sizes.bridge_width,
                fullatt_block_indexes=list(sizes.full_attention),
                initializer_range=sizes.width**-0.5,  # 0.028 at the released width; 0.02 is too little for small ones
            )
        )

    def forward(self, patches: Tensor, layout: Layout) -> Features:
        """Encodes packed images.

        Args:
            patches: [T, 3 * patch * patch] of `patchify`, RGB in [0, 1].
            layout: where they lie.
        """
        sizes, tower = self.sizes, self.visual_model
        images = layout.images()
        windows = layout.windows(sizes.window // sizes.patch)
        cos, sin = rotary(layout, sizes.width // sizes.heads, ROPE_THETA)
        hidden_TD = self._embed(patches)
        states = []
        for index, block in enumerate(tower.blocks):
            segments = images if index in sizes.full_attention else windows
            hidden_TD = hidden_TD + self._attention(block.attn, block.norm1(hidden_TD), segments, cos, sin)
            hidden_TD = hidden_TD + block.mlp(block.norm2(hidden_TD))
            states.append(hidden_TD)
        return Features(tuple(states), tower.merger(hidden_TD))

    def _embed(self, patches_TP: Tensor) -> Tensor:
        """The patch convolution as the matrix product that it is: a still image fills every temporal frame."""
        sizes = self.sizes
        mean, std = (patches_TP.new_tensor(x)[:, None] for x in (MEAN, STD))
        pixels = (patches_TP.unflatten(1, (3, -1)) - mean) / std
        frames = pixels[:, :, None].expand(-1, -1, sizes.temporal_patch, -1)
        weight = self.visual_model.patch_embed.proj.weight.flatten(1)
        return linear(frames.flatten(1).to(weight.dtype), weight)

    def _attention(self, attn: nn.Module, x_TD: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = attn.qkv(x_TD).unflatten(1, (3, self.sizes.heads, -1))  # type: ignore[operator]
        return attn.proj(attend(qkv, segments, cos, sin).flatten(1))  # type: ignore[operator]


def shallow_distance(features: Features, reference: Features, depth: int) -> Tensor:
    """Mean squared distance of the states after the first `depth` blocks, each patch scaled to unit power."""
    pairs = zip(features.hidden[:depth], reference.hidden[:depth], strict=True)
    distances = [((a - b).square().mean(-1) / b.square().mean(-1).clamp_min(1e-6)).mean() for a, b in pairs]
    return torch.stack(distances).mean()
