"""Whisper encoder over clips of unequal length, and the released model's gated pooling of its 50 Hz to 12.5 Hz.

Dimension key
    B clips    M mels    S mel frames    P encoder frames (S / 2)    T positions (P / pool)    D encoder width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from longcat_model import config


def whisper_config(
    width: int, heads: int, mlp_width: int, *, depth: int = 1, mels: int = 80, positions: int = 8
) -> WhisperConfig:
    """A transformers config that describes an encoder of these sizes, without dropout."""
    sizes = WhisperConfig(
        d_model=width,
        encoder_attention_heads=heads,
        encoder_ffn_dim=mlp_width,
        encoder_layers=depth,
        num_mel_bins=mels,
        max_source_positions=positions,
        dropout=0.0,
        init_std=width**-0.5,  # 0.028 at Whisper's own width, where its config says 0.02
    )
    sizes._attn_implementation = "sdpa"
    return sizes


def transformer_layers(width: int, heads: int, mlp_width: int, depth: int) -> nn.ModuleList:
    """Whisper encoder layers for parts that are no Whisper encoder: decoder, refiner, answer decoder."""
    sizes = whisper_config(width, heads, mlp_width)
    return nn.ModuleList(WhisperEncoderLayer(sizes) for _ in range(depth))


def length_mask(lengths_B: Tensor, size: int) -> Tensor:
    """[B, size] bool: which positions lie within each clip."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, 1, S] that hides the positions where `valid` [B, S] is False."""
    return torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, torch.finfo(dtype).min)[:, None, None]


class AudioEncoder(nn.Module):
    """Transformers' Whisper encoder, run on variable lengths: padding never reaches a clip's own frames.

    `whisper` is the unchanged transformers module, so its state dict loads as it is; only the order of calls is ours,
    because transformers' forward accepts 30-second inputs alone.
    """

    def __init__(self, sizes: config.AudioEncoder) -> None:
        super().__init__()
        self.whisper = WhisperEncoder(
            whisper_config(
                sizes.width,
                sizes.heads,
                sizes.mlp_width,
                depth=sizes.depth,
                mels=sizes.mels,
                positions=sizes.max_positions,
            )
        )

    def forward(self, log_mel_BMS: Tensor, frames_B: Tensor) -> Tensor:
        """Encoder frames [B, ceil(S / 2), D]; those beyond ceil(frames / 2) of a clip are meaningless.

        Args:
            log_mel_BMS: log-mel of `LogMel`, 0 beyond each clip's frames.
            frames_B: int64, mel frames of each clip.
        """
        valid_BS = length_mask(frames_B, log_mel_BMS.shape[2])
        hidden_BDS = gelu(self.whisper.conv1(log_mel_BMS.to(self.whisper.conv1.weight.dtype))) * valid_BS[:, None]
        hidden_BPD = gelu(self.whisper.conv2(hidden_BDS)).transpose(1, 2)
        size = hidden_BPD.shape[1]
        hidden_BPD = hidden_BPD + self.whisper.embed_positions.weight[:size]
        bias = key_bias(length_mask((frames_B + 1) // 2, size), hidden_BPD.dtype)
        for layer in self.whisper.layers:
            hidden_BPD = layer(hidden_BPD, bias)
        return self.whisper.layer_norm(hidden_BPD)


class GatedPool(nn.Module):
    """SwiGLU over `pool` neighbouring frames with the frames themselves as residual: LayerNorm(down(SiLU(g) u) + x)."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        wide = width * pool
        self.pool = pool
        self.gate_proj = nn.Conv1d(width, wide, pool, stride=pool, bias=False)
        self.up_proj = nn.Conv1d(width, wide, pool, stride=pool, bias=False)
        self.down_proj = nn.Linear(wide, wide, bias=False)
        self.layer_norm = nn.LayerNorm(wide)

    def forward(self, hidden_BPD: Tensor) -> Tensor:
        """Positions [B, P // pool, pool * D]; frames left over at the end are dropped."""
        positions = hidden_BPD.shape[1] // self.pool
        hidden_BPD = hidden_BPD[:, : positions * self.pool]
        channels_first = hidden_BPD.transpose(1, 2)
        gated = (silu(self.gate_proj(channels_first)) * self.up_proj(channels_first)).transpose(1, 2)
        return self.layer_norm(self.down_proj(gated) + hidden_BPD.reshape(gated.shape))
