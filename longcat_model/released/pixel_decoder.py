"""The released pixel decoder: summed codewords to a first image, a ViT without masks.

Its weights are in a file of their own (`image_decoder/image_decoder.safetensors`, prefix `image_decoder.`) whose header
is not public: parameter names within are this project's, sizes and order of steps the released ones, as far as those
are known. Norms' eps is not.

Dimension key
    M positions    T patches (4 M)    D width    H heads    C head channels    P numbers of a patch
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from longcat_model import config
from longcat_model.released.quirks import Quirks, has_quirks
from longcat_model.tokenizers.vision.encoder import MEAN, STD
from longcat_model.tokenizers.vision.packing import Layout

EPS = 1e-6
TEMPORAL = 2  # frames of a patch, of which the first one is the image


class PixelDecoder(nn.Module):
    """Takes the place of `tokenizers.vision.pixel_decoder.PixelDecoder`: same arguments, same result."""

    def __init__(
        self, sizes: config.PixelDecoder, *, codeword: int, patch: int, merge: int, quirks: Quirks = "released"
    ) -> None:
        super().__init__()
        width, unmerged = sizes.width, sizes.width * merge**2
        self.sizes, self.has_quirks = sizes, has_quirks(quirks)
        self.post_quant_conv = nn.Sequential(nn.Linear(codeword, width), nn.RMSNorm(width, eps=EPS))
        self.patch_unmerger = nn.Sequential(
            nn.RMSNorm(width, eps=EPS), nn.Linear(width, unmerged), nn.GELU(), nn.Linear(unmerged, unmerged)
        )
        self.norm_in = nn.RMSNorm(width, eps=EPS)
        self.layers = nn.ModuleList(_Layer(sizes, self.has_quirks) for _ in range(sizes.depth))
        self.norm_out = nn.RMSNorm(width, eps=EPS)
        outputs = 3 * TEMPORAL * patch**2
        self.head = nn.Sequential(nn.Linear(width, sizes.mlp_width), nn.GELU(), nn.Linear(sizes.mlp_width, outputs))

    def forward(self, codewords: Tensor, layout: Layout) -> Tensor:
        """Decodes summed codewords.

        Args:
            codewords: [M, codeword].
            layout: of the images they belong to.

        Returns:
            patches [T, 3 * patch * patch], RGB about [0, 1], not clamped.
        """
        merged_MD = self.patch_unmerger(self.post_quant_conv(codewords))
        x_TD = self.norm_in(merged_MD.view(-1, self.sizes.width))
        rows_T, columns_T = positions(layout, raster=self.has_quirks)
        turns_TC = turns(rows_T, columns_T, self.sizes.width // self.sizes.heads, self.sizes.rope_theta)
        lengths = [n * layout.merge**2 for n in layout.positions]
        for layer in self.layers:
            x_TD = layer(x_TD, turns_TC, lengths)
        pixels = self.head(self.norm_out(x_TD)).unflatten(1, (3, TEMPORAL, -1))[:, :, 0]
        mean, std = (pixels.new_tensor(x)[:, None] for x in (MEAN, STD))
        return (pixels * std + mean).flatten(1)


def positions(layout: Layout, *, raster: bool) -> tuple[Tensor, Tensor]:
    """Rows and columns [T] that the rotary angles of the packed vectors are taken from.

    Args:
        raster: count through each image row by row, although vectors lie in groups of merge x merge.
    """
    if not raster:
        return layout.row, layout.column
    rows, columns = [], []
    for height, width in layout.grids:
        across = width * layout.merge
        number = torch.arange(height * layout.merge * across, device=layout.row.device)
        rows.append(number // across)
        columns.append(number % across)
    return torch.cat(rows), torch.cat(columns)


def turns(rows_T: Tensor, columns_T: Tensor, channels: int, theta: float) -> Tensor:
    """Complex [T, 1, C / 2]: the first half of a head's pairs turn with rows, the second with columns."""
    quarter = channels // 4
    rates = theta ** -(torch.arange(quarter, device=rows_T.device, dtype=torch.float32) / quarter)
    angles = torch.cat([x[:, None].float() * rates for x in (rows_T, columns_T)], 1)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


class _Layer(nn.Module):
    """Attention and SwiGLU, each with a norm before and one within."""

    def __init__(self, sizes: config.PixelDecoder, quirks: bool) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.mlp_width
        self.heads, self.has_quirks = sizes.heads, quirks
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)
        self.inner_attn_ln = nn.RMSNorm(width, eps=EPS)
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.ffn_ln = nn.RMSNorm(inner, eps=EPS)

    def forward(self, x_TD: Tensor, turns_TC: Tensor, lengths: list[int]) -> Tensor:
        x_TD = x_TD + self.out_proj(self.inner_attn_ln(self._attend(self.norm1(x_TD), turns_TC, lengths)))
        normed_TD = self.norm2(x_TD)
        return x_TD + self.w3(self.ffn_ln(silu(self.w1(normed_TD)) * self.w2(normed_TD)))

    def _attend(self, x_TD: Tensor, turns_TC: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = (p(x_TD).unflatten(1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _turn(q, turns_TC), _turn(k, turns_TC)
        if self.has_quirks:
            q, k, v = ((q * q.shape[-1] ** -0.5).half(), k.half(), v.half())
        images = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        outputs = [
            scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in image))[0].transpose(0, 1)
            for image in images
        ]
        return torch.cat(outputs).flatten(1).to(x_TD.dtype)


def _turn(x_THC: Tensor, turns_TC: Tensor) -> Tensor:
    """Turns interleaved pairs, in float32."""
    pairs = torch.view_as_complex(x_THC.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_TC).flatten(-2).to(x_THC.dtype)
