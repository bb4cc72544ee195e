"""Flow-matching refinement of the coarse mel, with the released model's path, times, guidance and steps.

Linear path y = (1 - (1 - s) t) z + t x1 with target velocity x1 - (1 - s) z, times on the cosine schedule, the
condition dropped at random in training for classifier-free guidance v = (1 + g) v(mu) - g v(0), Euler steps at
inference. Here x1 is what the coarse mel lacks (the true mel minus it) rather than the whole mel: a small estimator
that trains for minutes then starts from the coarse mel instead of having to learn to repeat it. The released estimator
also has a prenet before it, attends in chunks of 100 frames, and reads the decoder's hidden states instead of its mel.

Dimension key
    B clips    M mels    S mel frames    D estimator width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longcat_model import config
from longcat_model.tokenizers.audio.decoder import masked_mean
from longcat_model.tokenizers.audio.encoder import key_bias, length_mask, transformer_layers

SIGMA_MIN = 1e-4  # the released code's default
DROP_RATE = 0.2  # share of training clips without condition; the report names none
SCALE = 5.0  # coarse log-mels miss the true ones by about a fifth; the flow runs at unit scale


class TimeEmbedding(nn.Module):
    """Sinusoid of t in [0, 1], scaled by 1000, through a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, time_B: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=time_B.device) * (-math.log(10_000) / max(half - 1, 1)))
        angles = 1000 * time_B[:, None] * rates
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class ConvBlock(nn.Module):
    """Two width-3 convolutions, each normalised and masked, with the time embedding added between.

    SiLU where the released estimator has Mish, whose gradient takes five times as long on a CPU.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.time = nn.Linear(width, width)

    def forward(self, hidden_BSD: Tensor, time_BD: Tensor, valid_BS1: Tensor) -> Tensor:
        inner = self._convolve(self.conv1, silu(self.norm1(hidden_BSD)) * valid_BS1)
        inner = inner + self.time(time_BD)[:, None]
        return hidden_BSD + self._convolve(self.conv2, silu(self.norm2(inner)) * valid_BS1)

    @staticmethod
    def _convolve(conv: nn.Conv1d, hidden_BSD: Tensor) -> Tensor:
        return conv(hidden_BSD.transpose(1, 2)).transpose(1, 2)


class MelRefiner(nn.Module):
    """Velocity estimator: `depth` groups of a convolution block and a transformer layer at the mel's own rate."""

    def __init__(self, sizes: config.MelRefiner, mels: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.proj_in = nn.Linear(2 * mels, sizes.width)
        self.time = TimeEmbedding(sizes.width)
        self.convs = nn.ModuleList(ConvBlock(sizes.width) for _ in range(sizes.depth))
        self.layers = transformer_layers(sizes.width, sizes.heads, 4 * sizes.width, sizes.depth)
        self.norm = nn.LayerNorm(sizes.width)
        self.proj_out = nn.Linear(sizes.width, mels)

    def forward(self, x_BMS: Tensor, condition_BMS: Tensor, time_B: Tensor, frames_B: Tensor) -> Tensor:
        """Velocity [B, M, S] at `time_B` in [0, 1]; 0 beyond each clip's frames."""
        valid_BS1 = length_mask(frames_B, x_BMS.shape[2])[..., None]
        hidden_BSD = self.proj_in(torch.cat([x_BMS, condition_BMS], 1).transpose(1, 2))
        time_BD = self.time(time_B)
        bias = key_bias(valid_BS1[..., 0], hidden_BSD.dtype)
        for conv, layer in zip(self.convs, self.layers, strict=True):
            hidden_BSD = layer(conv(hidden_BSD, time_BD, valid_BS1), bias)
        learned_BMS = (self.proj_out(self.norm(hidden_BSD)) * valid_BS1).transpose(1, 2)
        # The best velocity for white data of unit variance is linear in x; the network learns only what that lacks.
        time = time_B[:, None, None]
        power = torch.square(time) + torch.square(1 - time)
        return (2 * time - 1) / power * x_BMS * valid_BS1.transpose(1, 2) + learned_BMS * power.rsqrt()

    def loss(self, target_BMS: Tensor, coarse_BMS: Tensor, frames_B: Tensor) -> Tensor:
        """Masked mean squared error of the velocity at random times; draws from torch's global generator."""
        target = (target_BMS - coarse_BMS) * SCALE
        noise = torch.randn_like(target)
        batch = target.shape[0]
        time_B = 1 - torch.cos(torch.rand(batch, device=target.device) * (math.pi / 2))
        keep_B = (torch.rand(batch, device=target.device) >= DROP_RATE).to(target.dtype)
        time = time_B[:, None, None]
        point = (1 - (1 - SIGMA_MIN) * time) * noise + time * target
        velocity = self(point, coarse_BMS * keep_B[:, None, None], time_B, frames_B)
        return masked_mean(torch.square(velocity - (target - (1 - SIGMA_MIN) * noise)), frames_B)

    def refine(self, coarse_BMS: Tensor, frames_B: Tensor, *, seed: int = 0) -> Tensor:
        """Log-mel [B, M, S] from the coarse one; depends on `seed` and the clip itself, not on its batch mates."""
        steps, guidance = self.sizes.steps, self.sizes.guidance
        times = 1 - torch.cos(torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2))
        both = torch.cat([coarse_BMS, torch.zeros_like(coarse_BMS)])
        frames = torch.cat([frames_B, frames_B])
        x_BMS = self.sizes.temperature * _noise(coarse_BMS, frames_B, seed)
        for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            time = coarse_BMS.new_full((len(frames),), start)
            guided, free = self(torch.cat([x_BMS, x_BMS]), both, time, frames).chunk(2)
            x_BMS = x_BMS + (end - start) * ((1 + guidance) * guided - guidance * free)
        return coarse_BMS + x_BMS / SCALE


def _noise(like_BMS: Tensor, frames_B: Tensor, seed: int) -> Tensor:
    """Each clip's own standard normal noise, drawn on the CPU so that every device refines alike."""
    noise = torch.zeros(like_BMS.shape)
    for row, frames in enumerate(frames_B.tolist()):
        generator = torch.Generator().manual_seed(seed)
        noise[row, :, :frames] = torch.randn(frames, like_BMS.shape[1], generator=generator).T
    return noise.to(like_BMS)
