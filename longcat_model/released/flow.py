"""The released flow matching for speech: from the prenet's mel to a mel that a vocoder can speak (CosyVoice's kind).

Every parameter has its released name, under `model.audio_tokenizer.audio_flow_matching_decoder.conditional_decoder.`.
The estimator is a U-Net of one resolution: one group down, some in the middle, one up that also reads what went down.
A group is a block of two causal convolutions, shifted by the time, and transformer blocks.

Dimension key
    S frames    M mels    W channels    T channels of the time
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mish, pad, scaled_dot_product_attention, silu

from longcat_model.released.sizes import Flow

CHUNK = 100  # frames that see each other, and all before them: 2 s
STEPS = 10
GUIDANCE = 0.7  # v = (1 + g) v(condition) - g v(0)
TIME_SCALE = 1000.0


class Estimator(nn.Module):
    """Velocity of the flow at a point, a condition and a time."""

    def __init__(self, sizes: Flow) -> None:
        super().__init__()
        width, inputs = sizes.channels, 2 * sizes.mels
        self.time_channels = inputs
        time = {"linear_1": nn.Linear(inputs, 4 * width), "linear_2": nn.Linear(4 * width, 4 * width)}
        self.time_mlp = nn.ModuleDict(time)
        self.down_blocks = nn.ModuleList([_Group(inputs, sizes, tail=True)])
        self.mid_blocks = nn.ModuleList(_Group(width, sizes) for _ in range(sizes.mid_blocks))
        self.up_blocks = nn.ModuleList([_Group(2 * width, sizes, tail=True)])
        self.final_block = _Causal(width, width)
        self.final_proj = nn.Conv1d(width, sizes.mels, 1)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Velocity.

        Args:
            x: [B, M, S], clips of one length.
            condition: likewise.
            time: float32 [B] in [0, 1].

        Returns:
            [B, M, S].
        """
        time_BT = self.time_mlp["linear_1"](sinusoids(time, self.time_channels).to(x.dtype))
        time_BT = self.time_mlp["linear_2"](silu(time_BT))
        mask_SS = chunk_mask(x.shape[2], x.device)
        (down,), (up,) = self.down_blocks, self.up_blocks
        skipped_BWS = down(torch.cat([x, condition], 1), time_BT, mask_SS)
        hidden_BWS = _convolve(down.get_submodule("2"), skipped_BWS)
        for group in self.mid_blocks:
            hidden_BWS = group(hidden_BWS, time_BT, mask_SS)
        hidden_BWS = up(torch.cat([hidden_BWS, skipped_BWS], 1), time_BT, mask_SS)
        return self.final_proj(self.final_block(_convolve(up.get_submodule("2"), hidden_BWS)))


@torch.no_grad()
def sample(estimator: nn.Module, condition: Tensor, *, seed: int = 0, steps: int = STEPS) -> Tensor:
    """Euler steps at the times 1 - cos(pi / 2 * i / steps), with classifier-free guidance.

    Args:
        condition: [S, M], the prenet's.
        seed: of the noise that the flow starts from, drawn on the CPU.

    Returns:
        the mel [S, M], float32.
    """
    condition_1MS = condition.T[None]
    noise = torch.randn(condition_1MS.shape, generator=torch.Generator().manual_seed(seed))
    x_1MS = noise.to(condition.device)
    both = torch.cat([condition_1MS, torch.zeros_like(condition_1MS)])
    times = (1 - torch.cos(torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2))).tolist()
    for start, end in pairwise(times):
        time = torch.full((2,), start, device=condition.device)
        guided, free = estimator(torch.cat([x_1MS, x_1MS]).to(condition.dtype), both, time).chunk(2)
        x_1MS = x_1MS + (end - start) * ((1 + GUIDANCE) * guided - GUIDANCE * free)
    return x_1MS[0].T


def chunk_mask(frames: int, device: torch.device | str = "cpu") -> Tensor:
    """[S, S] bool: a frame sees the whole of its chunk and of all earlier ones."""
    chunk_S = torch.arange(frames, device=device) // CHUNK
    return chunk_S[:, None] >= chunk_S


def sinusoids(time_B: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of 1000 t at rates from 1 down to 1e-4."""
    half = channels // 2
    rates = torch.exp(torch.arange(half, device=time_B.device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = TIME_SCALE * time_B[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class _Group(nn.ModuleList):
    """[residual block, transformer blocks] and, with `tail`, a causal convolution that the caller runs."""

    def __init__(self, inputs: int, sizes: Flow, *, tail: bool = False) -> None:
        blocks = nn.ModuleList(_Transformer(sizes) for _ in range(sizes.blocks))
        parts = [_Residual(inputs, sizes.channels), blocks]
        super().__init__([*parts, nn.Conv1d(sizes.channels, sizes.channels, 3)] if tail else parts)

    def forward(self, x_BWS: Tensor, time_BT: Tensor, mask_SS: Tensor) -> Tensor:
        hidden_BSW = self[0](x_BWS, time_BT).transpose(1, 2)
        for block in self[1].children():
            hidden_BSW = block(hidden_BSW, mask_SS)
        return hidden_BSW.transpose(1, 2)


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(4 * width, width))
        self.block1, self.block2 = _Causal(inputs, width), _Causal(width, width)
        self.res_conv = nn.Conv1d(inputs, width, 1)

    def forward(self, x_BWS: Tensor, time_BT: Tensor) -> Tensor:
        hidden_BWS = self.block1(x_BWS) + self.mlp(time_BT)[..., None]
        return self.block2(hidden_BWS) + self.res_conv(x_BWS)


class _Causal(nn.Module):
    """Causal convolution, LayerNorm, Mish; the numbers of `block` are the released ones."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"0": nn.Conv1d(inputs, width, 3), "2": nn.LayerNorm(width)})

    def forward(self, x_BWS: Tensor) -> Tensor:
        normed_BSW = self.block["2"](_convolve(self.block["0"], x_BWS).transpose(1, 2))
        return mish(normed_BSW).transpose(1, 2)


class _Transformer(nn.Module):
    def __init__(self, sizes: Flow) -> None:
        super().__init__()
        width = sizes.channels
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = _Attention(width, sizes.heads, sizes.inner)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({"net": nn.ModuleDict({"0": nn.ModuleDict({"proj": widen}), "2": narrow})})

    def forward(self, x_BSW: Tensor, mask_SS: Tensor) -> Tensor:
        x_BSW = x_BSW + self.attn1(self.norm1(x_BSW), mask_SS)
        widen, narrow = self.ff.get_submodule("net.0.proj"), self.ff.get_submodule("net.2")
        return x_BSW + narrow(gelu(widen(self.norm3(x_BSW))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x_BSW: Tensor, mask_SS: Tensor) -> Tensor:
        q, k, v = (p(x_BSW).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        out_BHSC = scaled_dot_product_attention(q, k, v, attn_mask=mask_SS)
        return self.to_out[0](out_BHSC.transpose(1, 2).flatten(2))


def _convolve(conv: nn.Module, x_BWS: Tensor) -> Tensor:
    """A convolution of kernel 3 in which a frame sees itself and the two before it."""
    out: Tensor = conv(pad(x_BWS, (2, 0)))
    return out
