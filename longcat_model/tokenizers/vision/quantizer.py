"""Discrete bottleneck: quant_conv, residual vector quantizer, light semantic decoder (equations (3) to (5)).

Dimension key
    M positions    Z bridge width    D codeword width    L levels
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from longcat_kernels.modules import ResidualVQ
from longcat_model import config


class Quantized(NamedTuple):
    codes: Tensor  # [M, L] int64
    quantized: Tensor  # [M, D], straight-through
    commitment: Tensor  # scalar
    semantic: Tensor  # scalar


class Quantizer(nn.Module):
    """Projects features to the codebook space and quantizes them there."""

    def __init__(self, sizes: config.Quantizer, features: int) -> None:
        super().__init__()
        self.quant_conv = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, features), nn.GELU(), nn.Linear(features, sizes.dim)
        )
        self.quantize = ResidualVQ(
            sizes.sizes,
            sizes.dim,
            shared=sizes.shared,
            decay=sizes.decay,
            eps=sizes.eps,
            restart_threshold=sizes.restart_threshold,
        )
        self.semantic_decoder = nn.Sequential(
            nn.Linear(sizes.dim, 2 * features), nn.GELU(), nn.Linear(2 * features, features)
        )

    def forward(self, features: Tensor) -> Quantized:
        """Quantizes features [M, Z] and gives the two terms of L_quant; in training mode the codebooks move too.

        Commitment is the mean over levels of mean((r_0 - sg(q_1 + ... + q_l))^2); semantic is one minus the cosine of
        the light decoder's output on the quantized vectors and the detached features.
        """
        encoding = self.quantize(self.quant_conv(features))
        rebuilt = self.semantic_decoder(encoding.quantized)
        semantic = 1 - cosine_similarity(rebuilt, features.detach(), dim=-1).mean()
        return Quantized(encoding.codes, encoding.quantized, encoding.losses.mean(), semantic)

    def encode(self, features: Tensor) -> Tensor:
        """Codes [M, L] of features [M, Z]; changes nothing."""
        return self.quantize.encode(self.quant_conv(features)).codes

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Sums codewords: [M, L] to [M, D]; -1 adds nothing; `levels` keeps the first ones only."""
        return self.quantize.decode(codes if levels is None else codes[:, :levels], levels)
