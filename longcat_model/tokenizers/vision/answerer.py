"""Language-conditioned supervision of the encoder, equation (2): -log P(A | z_p, Q) of answers about an image.

A small autoregressive decoder reads a question token, then its own answer, and looks at the image's features through
cross-attention. It trains the encoder and is then dropped; kept aside, it measures equation (1): how well answers can
be read from quantized features in place of continuous ones.

Dimension key
    B images    M positions packed    N positions of the longest image    Q questions    S answer symbols, end included
    Z bridge width    D width    V symbols
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from longcat_model.tokenizers.vision.blocks import EPS
from longcat_model.tokenizers.vision.packing import Layout

IGNORED = -100  # answer symbols beyond the end


@dataclass(frozen=True)
class Pictures:
    """Images with the answers to the same questions about each."""

    images: Sequence[Tensor]  # each [3, height, width] in [0, 1]
    answers: Tensor  # int64 [B, Q, S], the end symbol included, then IGNORED


class Answerer(nn.Module):
    """P(A | z, Q) for a fixed list of questions."""

    def __init__(self, *, features: int, questions: int, symbols: int, longest: int, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.question = nn.Embedding(questions, width)
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Parameter(torch.randn(questions, longest, width) * 0.02)
        self.features_in = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
        self.layers = nn.ModuleList(_Layer(width) for _ in range(2))
        self.head = nn.Sequential(nn.RMSNorm(width, eps=EPS), nn.Linear(width, symbols))

    def forward(self, features: Tensor, layout: Layout, answers: Tensor) -> Tensor:
        """Logits of every answer symbol given those before it.

        Args:
            features: [M, Z], continuous or rebuilt from codes.
            layout: of the images.
            answers: int64 [B, Q, S]; only symbols before the last are read.

        Returns:
            [B, Q, S, V].
        """
        context_BND, seen_BN = self._context(features, layout)
        before = self.symbol(answers[..., :-1].clamp_min(0))
        start = self.question.weight[None, :, None].expand(len(answers), -1, -1, -1)
        x_BQSD = torch.cat([start, before], dim=2) + self.place[:, : answers.shape[2]]
        for layer in self.layers:
            x_BQSD = layer(x_BQSD, context_BND, seen_BN)
        return self.head(x_BQSD)

    def loss(self, features: Tensor, layout: Layout, answers: Tensor) -> tuple[Tensor, Tensor]:
        """-log P(A | z, Q), mean over symbols, and the share of answers [Q] right in every symbol (teacher-forced)."""
        answers = answers.to(features.device)
        logits = self(features, layout, answers)
        loss = cross_entropy(logits.flatten(0, -2), answers.flatten(), ignore_index=IGNORED)
        right = (logits.argmax(-1) == answers) | (answers == IGNORED)
        return loss, right.all(-1).float().mean(0)

    def _context(self, features_MZ: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Features with sinusoids of their row and column, padded to [B, N, D], and the mask of real ones."""
        first = layout.merge**2
        places = torch.stack([layout.row[::first], layout.column[::first]], dim=1) // layout.merge
        x_MD = self.features_in(features_MZ) + _sinusoids(places, self.width)
        seen = [x_MD.new_ones(n, dtype=torch.bool) for n in layout.positions]
        runs = list(x_MD.split(layout.positions))
        return pad_sequence(runs, batch_first=True), pad_sequence(seen, batch_first=True)


class _Layer(nn.Module):
    """Causal self-attention within an answer, cross-attention to the image, MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=EPS) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BQSD: Tensor, context_BND: Tensor, seen_BN: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x_BQSD)).chunk(3, dim=-1)
        x_BQSD = x_BQSD + self.out(scaled_dot_product_attention(q, k, v, is_causal=True))
        query_BRD = self.query(self.norms[1](x_BQSD)).flatten(1, 2)
        k, v = self.key_value(context_BND).chunk(2, dim=-1)
        looked_BRD = scaled_dot_product_attention(query_BRD, k, v, attn_mask=seen_BN[:, None])
        x_BQSD = x_BQSD + self.cross_out(looked_BRD).view_as(x_BQSD)
        return x_BQSD + self.mlp(self.norms[2](x_BQSD))


def _sinusoids(places_M2: Tensor, width: int) -> Tensor:
    """Position in two axes as [M, width], half the channels each."""
    frequency = 100.0 ** -(torch.arange(width // 4, device=places_M2.device) / (width // 4))
    angles = (places_M2[..., None] * frequency).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
