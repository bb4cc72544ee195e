"""A small autoregressive answer decoder: the LLM of equation (8) at demo scale.

The report feeds the quantized features to a frozen pretrained LLM and adds its answer loss. Nothing pretrained can be
fetched offline, so here a small decoder is trained along with the tokenizer to transcribe what it hears, and dropped
afterwards, as the report drops its LLM. Any module with the same call (features, positions, answers) -> loss can stand
in its place, a frozen LLM included.

Dimension key
    B clips    T positions    Q codeword width    A answer tokens    S = T + A + 1 sequence    D decoder width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.whisper.modeling_whisper import sinusoids

from longcat_model.tokenizers.audio.encoder import length_mask, transformer_layers

IGNORED = -100


class AnswerDecoder(nn.Module):
    """Causal transformer over [features, begin, answer]; its classes are the answer tokens and the end."""

    positions_SD: Tensor

    def __init__(self, features: int, tokens: int, *, width: int = 128, layers: int = 2, longest: int = 512) -> None:
        super().__init__()
        self.end = tokens  # also begins the answer
        self.proj = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
        self.embed = nn.Embedding(tokens + 1, width)
        self.register_buffer("positions_SD", sinusoids(longest, width), persistent=False)
        self.layers = transformer_layers(width, 4, 2 * width, layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens + 1)

    def forward(self, features: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy of the answers and their ends.

        Args:
            features: [B, T, Q] quantized vectors; anything beyond a clip's positions.
            positions: [B] int64, positions of each clip.
            answers: [B, A] int64 token ids, IGNORED beyond each answer's end.
        """
        logits_BAK = self._logits(features, positions, answers)
        ended = torch.nn.functional.pad(answers, (0, 1), value=IGNORED)
        lengths_B1 = (answers != IGNORED).sum(1, keepdim=True)
        ended = ended.scatter(1, lengths_B1, self.end)
        return cross_entropy(logits_BAK.flatten(0, 1), ended.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def transcribe(self, features: Tensor, positions: Tensor, *, longest: int = 3) -> list[list[int]]:
        """Greedy answers, as `forward` was trained to give; the end is not part of them."""
        answers = torch.full((len(features), 0), 0, dtype=torch.int64, device=features.device)
        for _ in range(longest + 1):
            token = self._logits(features, positions, answers)[:, -1].argmax(-1, keepdim=True)
            answers = torch.cat([answers, token], 1)
        rows = answers.tolist()
        return [row[: row.index(self.end)] if self.end in row else row[:longest] for row in rows]

    def _logits(self, features_BTQ: Tensor, positions_B: Tensor, answers_BA: Tensor) -> Tensor:
        """[B, A + 1, tokens + 1]: what follows the begin token and each answer token."""
        heard, said = features_BTQ.shape[1], answers_BA.shape[1] + 1
        begun = torch.nn.functional.pad(answers_BA.clamp(min=0), (1, 0), value=self.end)
        hidden_BSD = torch.cat(
            [self.proj(features_BTQ) + self.positions_SD[:heard], self.embed(begun) + self.positions_SD[:said]], 1
        )
        valid_BS = torch.nn.functional.pad(length_mask(positions_B, heard), (0, said), value=True)
        causal_SS = torch.ones(heard + said, heard + said, dtype=torch.bool, device=valid_BS.device).tril()
        # A padded position may always see itself: a row that sees nothing would be NaN.
        visible_BSS = (causal_SS & valid_BS[:, None]) | torch.eye(
            len(causal_SS), dtype=torch.bool, device=valid_BS.device
        )
        bias = torch.zeros_like(visible_BSS, dtype=hidden_BSD.dtype).masked_fill(~visible_BSS, float("-inf"))
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, bias[:, None])
        return self.head(self.norm(hidden_BSD[:, heard:]))
