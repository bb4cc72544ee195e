"""The released audio decoder: quantized vectors at 12.5 Hz to hidden states at 50 Hz, and those to a first mel.

Every parameter has its released name, under `model.audio_tokenizer.audio_decoder.` and
`model.audio_tokenizer.audio_flow_matching_decoder.prenet.`. One clip at a time: the first norm goes over its time.

Dimension key
    L positions    S frames    D decoder width    W prenet width    M mels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import sinusoids

from longcat_model import config
from longcat_model.released.quirks import Quirks, has_quirks
from longcat_model.released.sizes import Flow
from longcat_model.tokenizers.audio.encoder import transformer_layers

KERNEL, STRIDE = 3, 4  # of the convolution that takes 12.5 Hz to 50 Hz
EPS = 1e-6  # of the prenet's norms, whose value is not public
POST_LAYERS = 4


class CodecDecoder(nn.Module):
    """Transposed convolution, sinusoids, causal Whisper layers.

    `dconv2` and `post_net`, which would make 16 kHz mels of the hidden states, are there for their weights: the
    released model feeds the hidden states themselves to the flow.
    """

    positional_embedding: Tensor

    def __init__(self, sizes: config.AudioDecoder, flow: Flow, *, quirks: Quirks = "released") -> None:
        super().__init__()
        width, mels, post = sizes.width, flow.mels, flow.post_width
        self.left_out = STRIDE - KERNEL if has_quirks(quirks) else 0  # frames at the end that no position reaches
        padding = STRIDE - KERNEL - self.left_out
        self.dconv1 = _Normed(nn.ConvTranspose1d(width, width, KERNEL, STRIDE, output_padding=padding), width)
        self.register_buffer("positional_embedding", sinusoids(flow.decoder_positions, width))
        self.layers = transformer_layers(width, sizes.heads, sizes.mlp_width, sizes.depth)
        self.layer_norm = nn.LayerNorm(width)
        self.dconv2 = _Normed(nn.ConvTranspose1d(width, mels, 3, 2), mels)
        inputs = (mels, *[post] * (POST_LAYERS - 1))
        convolutions = [_Normed(nn.Conv1d(n, post, 5, padding=2), post) for n in inputs]
        self.post_net = nn.ModuleDict({"layers": nn.ModuleList([*convolutions, nn.Conv1d(post, mels, 1)])})

    def forward(self, quantized: Tensor) -> Tensor:
        """Hidden states of one clip.

        Args:
            quantized: [L, D], after the bridge's `proj_decoder`.

        Returns:
            [4 L - 1, D] with the released quirks, else [4 L, D].

        Raises:
            ValueError: more frames than the table of positions has (60 s in the released model).
        """
        frames = STRIDE * len(quantized) - self.left_out
        if frames > len(self.positional_embedding):
            most = (len(self.positional_embedding) + self.left_out) // STRIDE
            raise ValueError(f"CodecDecoder: quantized must have at most {most} positions, got {len(quantized)}")
        hidden_SD = self.dconv1(quantized.T[None])[0].T + self.positional_embedding[:frames]
        return self.layer_norm(causal(self.layers, hidden_SD))


class Prenet(nn.Module):
    """Hidden states to a first mel, what the flow is conditioned on."""

    def __init__(self, width: int, flow: Flow, *, quirks: Quirks = "released") -> None:
        super().__init__()
        inner, mlp = flow.prenet_width, flow.prenet_mlp
        self.in_mlp = nn.Sequential(nn.Linear(width, mlp), nn.SiLU(), nn.Linear(mlp, inner))
        self.transformer = _PrenetTransformer(flow, has_positions=not has_quirks(quirks))
        self.out_proj = nn.Linear(inner, flow.mels, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [S, D] of one clip; returns [S, M]. Rates are equal, so nothing is interpolated."""
        return self.out_proj(self.transformer(self.in_mlp(hidden)))


class _PrenetTransformer(nn.Module):
    positional_embedding: Tensor

    def __init__(self, flow: Flow, *, has_positions: bool) -> None:
        super().__init__()
        width = flow.prenet_width
        self.has_positions = has_positions
        self.register_buffer("positional_embedding", sinusoids(flow.prenet_positions, width))
        self.layers = transformer_layers(width, flow.prenet_heads, flow.prenet_mlp, flow.prenet_depth)
        for layer in self.layers:
            layer.self_attn_layer_norm = nn.RMSNorm(width, eps=EPS)
            layer.final_layer_norm = nn.RMSNorm(width, eps=EPS)
        self.layer_norm = nn.RMSNorm(width, eps=EPS)

    def forward(self, hidden_SW: Tensor) -> Tensor:
        if self.has_positions:
            hidden_SW = hidden_SW + self.positional_embedding[: len(hidden_SW)]
        return self.layer_norm(causal(self.layers, hidden_SW))


class _Normed(nn.Module):
    """A convolution and the norm over all of a clip that follows it."""

    def __init__(self, conv: nn.Conv1d | nn.ConvTranspose1d, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.GroupNorm(1, channels)

    def forward(self, x_1DS: Tensor) -> Tensor:
        return self.norm(self.conv(x_1DS))


def causal(layers: nn.ModuleList, hidden_SD: Tensor) -> Tensor:
    """Whisper layers in which a frame sees itself and earlier ones."""
    size = len(hidden_SD)
    later_SS = torch.ones(size, size, dtype=torch.bool, device=hidden_SD.device).triu(1)
    bias = torch.zeros_like(later_SS, dtype=hidden_SD.dtype).masked_fill(later_SS, float("-inf"))
    hidden_1SD = hidden_SD[None]
    for layer in layers:
        hidden_1SD = layer(hidden_1SD, bias[None, None])
    return hidden_1SD[0]
