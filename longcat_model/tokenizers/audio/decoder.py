"""Decoder from quantized vectors to a coarse log-mel, symmetric to the encoder (report section 2.3).

The released decoder lifts 12.5 Hz to 50 Hz by a transposed convolution of kernel 3 and stride 4: 4 T - 1 frames, every
fourth fed by the bias alone. Here kernel and stride are equal, so T positions give exactly pool T frames and every
frame sees a position; the last convolution then doubles the rate, to the front end's own frames. Normalisation is a
frame's own (LayerNorm), not over time (GroupNorm), which would let padding and batch mates change a clip. Attention
sees the whole clip, where the released layers are causal.

Dimension key
    B clips    T positions    P decoder frames (pool T)    S mel frames (2 P)    D decoder width    M mels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import sinusoids

from longcat_model import config
from longcat_model.tokenizers.audio.encoder import key_bias, length_mask, transformer_layers


class MelDecoder(nn.Module):
    """Summed codewords to log-mel frames of the same clip."""

    positions_PD: Tensor

    def __init__(self, sizes: config.AudioTokenizer) -> None:
        super().__init__()
        decoder, width = sizes.decoder, sizes.decoder.width
        self.pool = sizes.pool
        self.proj = nn.Linear(sizes.quantizer.dim, width)
        self.dconv1 = nn.ConvTranspose1d(width, width, sizes.pool, stride=sizes.pool)
        self.norm1 = nn.LayerNorm(width)
        self.register_buffer("positions_PD", sinusoids(sizes.encoder.max_positions, width), persistent=False)
        self.layers = transformer_layers(width, decoder.heads, decoder.mlp_width, decoder.depth)
        self.layer_norm = nn.LayerNorm(width)
        self.dconv2 = nn.ConvTranspose1d(width, sizes.encoder.mels, 4, stride=2, padding=1)

    def forward(self, quantized_BTQ: Tensor, positions_B: Tensor) -> Tensor:
        """Coarse log-mel [B, mels, 2 * pool * T], 0 beyond each clip.

        Args:
            quantized_BTQ: sums of codewords; anything beyond a clip's positions.
            positions_B: int64, positions of each clip.
        """
        frames_B = positions_B * self.pool
        hidden_BDT = self.proj(quantized_BTQ).transpose(1, 2)
        hidden_BPD = self.norm1(self.dconv1(hidden_BDT).transpose(1, 2))
        size = hidden_BPD.shape[1]
        valid_BP = length_mask(frames_B, size)
        hidden_BPD = hidden_BPD + self.positions_PD[:size]
        bias = key_bias(valid_BP, hidden_BPD.dtype)
        for layer in self.layers:
            hidden_BPD = layer(hidden_BPD, bias)
        hidden_BPD = self.layer_norm(hidden_BPD) * valid_BP[..., None]
        mel_BMS = self.dconv2(hidden_BPD.transpose(1, 2))
        return mel_BMS * length_mask(2 * frames_B, mel_BMS.shape[2])[:, None]


def masked_mean(values_BMS: Tensor, frames_B: Tensor) -> Tensor:
    """Mean of [B, M, S] over every clip's own frames."""
    valid = length_mask(frames_B, values_BMS.shape[2])[:, None].to(values_BMS.dtype)
    return (values_BMS * valid).sum() / (valid.sum().clamp(min=1) * values_BMS.shape[1])


def mel_loss(predicted_BMS: Tensor, target_BMS: Tensor, frames_B: Tensor) -> Tensor:
    """Reconstruction term of equation (8): absolute plus squared error of the log-mel (the report names no norm)."""
    error = predicted_BMS - target_BMS
    return masked_mean(error.abs() + torch.square(error), frames_B)
