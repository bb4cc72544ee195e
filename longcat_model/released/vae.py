"""The autoencoder that the released refiner works in: images to latents eight times smaller a side, and back.

The architecture is that of Flux's VAE, parameter names are those of diffusers' `AutoencoderKL`, prefix
`image_refiner.vae.` in `image_decoder/image_decoder.safetensors`.

Dimension key
    I images    W channels    C latent channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from longcat_model.released.sizes import VAESizes

EPS = 1e-6


class VAE(nn.Module):
    """`encode` gives latents of images, `decode` images of latents."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = _Encoder(sizes), _Decoder(sizes)

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Latents z = (sample - shift) * scale of images.

        Args:
            images: [I, 3, height, width] in [-1, 1], sides multiples of `factor`.
            generator: of the posterior's noise, on the CPU.

        Returns:
            [I, C, height / factor, width / factor].
        """
        mean, log_variance = self.encoder(images).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        drawn = mean + noise * torch.exp(0.5 * log_variance.clamp(-30, 20))
        return (drawn - self.sizes.shift) * self.sizes.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images [I, 3, height, width] about [-1, 1] of latents."""
        images: Tensor = self.decoder(latents / self.sizes.scale + self.sizes.shift)
        return images


class _Encoder(nn.Module):
    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths, groups = sizes.widths, sizes.groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        inputs = (widths[0], *widths[:-1])
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _Stage(a, b, groups, blocks=2, sampler="downsamplers" if i < last else None)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * sizes.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths, groups = sizes.widths[::-1], sizes.groups
        self.conv_in = nn.Conv2d(sizes.latent, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups)
        inputs = (widths[0], *widths[:-1])
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            _Stage(a, b, groups, blocks=3, sampler="upsamplers" if i < last else None)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class _Stage(nn.Module):
    """Residual blocks of one resolution and the way to the next."""

    def __init__(self, inputs: int, width: int, groups: int, *, blocks: int, sampler: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(width if i else inputs, width, groups) for i in range(blocks))
        self.sampler = sampler
        if sampler is not None:
            stride, padding = (2, 0) if sampler == "downsamplers" else (1, 1)
            conv = nn.Conv2d(width, width, 3, stride, padding)
            self.add_module(sampler, nn.ModuleList([nn.ModuleDict({"conv": conv})]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        if self.sampler is None:
            return x
        x = pad(x, (0, 1, 0, 1)) if self.sampler == "downsamplers" else interpolate(x, scale_factor=2.0)
        out: Tensor = self.get_submodule(f"{self.sampler}.0.conv")(x)
        return out


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Resnet(nn.Module):
    def __init__(self, inputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, eps=EPS), nn.GroupNorm(groups, width, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.group_norm(x).flatten(2).transpose(1, 2)
        out = scaled_dot_product_attention(self.to_q(flat), self.to_k(flat), self.to_v(flat))
        return x + self.to_out[0](out).transpose(1, 2).view_as(x)
