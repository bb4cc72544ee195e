"""Pixel decoder: summed codewords to an image in one pass (section 2.2.4 of the LongCat-Next report).

post_quant_conv, an un-merger that restores the patch grid, a ViT with 2-D rotary positions, and a head to pixels, in
the order of the released decoder. Not all is alike: patches turn with the places where their pixels go (the released
code counts them in raster order), scores are scaled once (there twice), keys have a bias, and the head gives the one
frame that the released code keeps of its temporal patch.

Dimension key
    M positions    T patches (M * merge^2)    D decoder width    P numbers of a patch
"""

from __future__ import annotations

from torch import Tensor, nn

from longcat_model import config
from longcat_model.tokenizers.vision.blocks import EPS, Block
from longcat_model.tokenizers.vision.encoder import MEAN, STD
from longcat_model.tokenizers.vision.packing import Layout, rotary


class PixelDecoder(nn.Module):
    def __init__(self, sizes: config.PixelDecoder, *, codeword: int, patch: int, merge: int) -> None:
        super().__init__()
        self.sizes, self.merge = sizes, merge
        unmerged = sizes.width * merge**2
        self.post_quant_conv = nn.Sequential(nn.Linear(codeword, sizes.width), nn.RMSNorm(sizes.width, eps=EPS))
        self.patch_unmerger = nn.Sequential(
            nn.RMSNorm(sizes.width, eps=EPS), nn.Linear(sizes.width, unmerged), nn.GELU(), nn.Linear(unmerged, unmerged)
        )
        self.norm_in = nn.RMSNorm(sizes.width, eps=EPS)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads, sizes.mlp_width) for _ in range(sizes.depth))
        self.norm_out = nn.RMSNorm(sizes.width, eps=EPS)
        self.head = nn.Sequential(
            nn.Linear(sizes.width, sizes.mlp_width), nn.GELU(), nn.Linear(sizes.mlp_width, 3 * patch**2)
        )

    def forward(self, codewords: Tensor, layout: Layout) -> Tensor:
        """Decodes summed codewords.

        Args:
            codewords: [M, codeword].
            layout: of the images they belong to.

        Returns:
            patches [T, 3 * patch * patch], RGB about [0, 1], not clamped so that a loss sees overshoot.
        """
        merged_MD = self.patch_unmerger(self.post_quant_conv(codewords))
        x_TD = self.norm_in(merged_MD.view(-1, self.sizes.width))
        segments = layout.images()
        rope = rotary(layout, self.sizes.width // self.sizes.heads, self.sizes.rope_theta)
        for block in self.blocks:
            x_TD = block(x_TD, segments, rope)
        pixels = self.head(self.norm_out(x_TD)).unflatten(1, (3, -1))
        mean, std = (pixels.new_tensor(x)[:, None] for x in (MEAN, STD))
        return (pixels * std + mean).flatten(1)
