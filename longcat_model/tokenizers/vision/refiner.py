"""Flow-matching refiner in pixel space: adds the detail that the pixel decoder averages away.

The path is linear, x_t = (1 - t) * noise + t * image with pixels in [-1, 1], its velocity is image - noise, and
sampling is Euler from t = 0 to 1 in equal steps. The decoder's image enters as channels beside x_t, the summed
codewords as a projection added at every patch. The released refiner works on the latents of a VAE and gives the
velocity itself; this one gives the image as a correction of the decoder's, from which the velocity is
(image - x_t) / (1 - t), so that an untrained refiner changes nothing.

Dimension key
    I images    T patches    M positions    D refiner width    P numbers of a patch
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longcat_model import config
from longcat_model.tokenizers.vision.blocks import EPS, Block
from longcat_model.tokenizers.vision.packing import Layout, rotary

TIME_CHANNELS = 64
LEAST_REMAINING = 0.05  # 1 - t is not taken smaller, which bounds the weight of the last moments in the loss
TIME_SCALE = 1000.0  # t in [0, 1] to the range that sinusoids of period up to 1e4 resolve
ROPE_THETA = 1e4


class Refiner(nn.Module):
    def __init__(self, sizes: config.Refiner, *, codeword: int, patch: int, merge: int) -> None:
        super().__init__()
        self.sizes, self.merge = sizes, merge
        pixels = 3 * patch**2
        self.patch_embed = nn.Linear(2 * pixels, sizes.width)
        self.cond_proj = nn.Linear(codeword, sizes.width)
        self.time_embed = nn.Sequential(nn.Linear(TIME_CHANNELS, sizes.width), nn.SiLU())
        blocks = (Block(sizes.width, sizes.heads, 4 * sizes.width, modulated=True) for _ in range(sizes.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.RMSNorm(sizes.width, eps=EPS)
        self.head = nn.Linear(sizes.width, pixels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, noisy: Tensor, coarse: Tensor, codewords: Tensor, time: Tensor, layout: Layout) -> Tensor:
        """Velocity of packed patches.

        Args:
            noisy: x_t, [T, P], pixels in [-1, 1].
            coarse: the decoder's image, likewise.
            codewords: [M, codeword].
            time: float [I] in [0, 1].
            layout: of the images.

        Returns:
            [T, P].
        """
        time_TD = self.time_embed(_sinusoids(time))[layout.image]
        codewords_TD = self.cond_proj(codewords).repeat_interleave(self.merge**2, dim=0)
        x_TD = self.patch_embed(torch.cat([noisy, coarse], dim=1)) + codewords_TD
        segments = layout.images()
        rope = rotary(layout, self.sizes.width // self.sizes.heads, ROPE_THETA)
        for block in self.blocks:
            x_TD = block(x_TD, segments, rope, time_TD)
        image_TP = coarse + self.head(self.norm_out(x_TD))
        least = min(LEAST_REMAINING, 1 / self.sizes.steps)  # so that the last step of sampling goes the whole way
        return (image_TP - noisy) / (1 - time).clamp_min(least)[layout.image, None]

    def loss(self, images: Tensor, coarse: Tensor, codewords: Tensor, layout: Layout) -> Tensor:
        """Flow-matching loss at one random time an image, from torch's global generator; arguments as in `sample`."""
        target_TP, noise_TP = 2 * images - 1, torch.randn_like(images)
        time_I = torch.rand(len(layout.grids), device=images.device)
        time_T1 = time_I[layout.image, None]
        noisy_TP = (1 - time_T1) * noise_TP + time_T1 * target_TP
        velocity_TP = self(noisy_TP, 2 * coarse - 1, codewords, time_I, layout)
        return (velocity_TP - (target_TP - noise_TP)).square().mean()

    @torch.no_grad()
    def sample(self, coarse: Tensor, codewords: Tensor, layout: Layout, seed: int) -> Tensor:
        """Refines packed patches [T, P] in [0, 1].

        Notes: an image's noise follows from `seed` and its size alone, so its batch mates do not change it.
        """
        x_TP = self.sizes.temperature * _noise(layout, coarse.shape[1], seed).to(coarse)
        condition_TP = 2 * coarse - 1
        for step in range(self.sizes.steps):
            time_I = coarse.new_full((len(layout.grids),), step / self.sizes.steps)
            x_TP = x_TP + self(x_TP, condition_TP, codewords, time_I, layout) / self.sizes.steps
        return (x_TP + 1) / 2


def _noise(layout: Layout, numbers: int, seed: int) -> Tensor:
    drawn = {}
    for patches in {n * layout.merge**2 for n in layout.positions}:
        drawn[patches] = torch.randn(patches, numbers, generator=torch.Generator().manual_seed(seed))
    return torch.cat([drawn[n * layout.merge**2] for n in layout.positions])


def _sinusoids(time_I: Tensor) -> Tensor:
    half = TIME_CHANNELS // 2
    frequency = torch.exp(-math.log(1e4) / half * torch.arange(half, device=time_I.device))
    angles = TIME_SCALE * time_I[:, None] * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=1)
