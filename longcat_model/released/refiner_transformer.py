"""The transformer of the released image refiner: velocity of a latent image, from the condition, a first image and the
noisy one in one sequence (OmniGen2's and Lumina 2's kind).

Its weights are in `image_decoder/image_decoder.safetensors` under `image_refiner.base_transformer.`; the header is not
public. Names within are those of OmniGen2's public transformer, as far as its parts are said to be there: an embedding
of the number of a reference image is not.

Dimension key
    N tokens    L condition tokens    D width    H heads    C head channels    T channels of the time
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from longcat_model.released.sizes import TransformerSizes

EPS = 1e-5
FREQUENCIES, TIME_SCALE = 256, 1000.0  # of the sinusoid of a time in [0, 1]


class Transformer(nn.Module):
    """Velocity of a latent image."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        pixels = sizes.latent * sizes.patch**2
        self.x_embedder = nn.Linear(pixels, sizes.width)
        self.ref_image_patch_embedder = nn.Linear(pixels, sizes.width)
        self.time_caption_embed = _TimeAndCondition(sizes)
        self.noise_refiner = nn.ModuleList(_Layer(sizes) for _ in range(sizes.refiners))
        self.ref_image_refiner = nn.ModuleList(_Layer(sizes) for _ in range(sizes.refiners))
        self.context_refiner = nn.ModuleList(_Layer(sizes, modulated=False) for _ in range(sizes.refiners))
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))
        self.norm_out = _Out(sizes)

    def forward(self, noisy: Tensor, reference: Tensor | None, condition: Tensor, time: float) -> Tensor:
        """Velocity of one image.

        Args:
            noisy: latents [channels, height, width] at the time; sides multiples of the patch.
            reference: latents of the first image, or None.
            condition: [L, condition channels].
            time: in [0, 1].

        Returns:
            like `noisy`.
        """
        sizes, length = self.sizes, len(condition)
        grid = (noisy.shape[1] // sizes.patch, noisy.shape[2] // sizes.patch)
        time_T, text_ND = self.time_caption_embed(time, condition)
        text_turns = turns(sizes, torch.arange(length)[:, None].expand(-1, 3)).to(noisy.device)
        parts, angles, start = [text_ND], [text_turns], length
        for layer in self.context_refiner:
            parts[0] = layer(parts[0], text_turns, time_T)
        if reference is not None:
            shape = (reference.shape[1] // sizes.patch, reference.shape[2] // sizes.patch)
            angles.append(turns(sizes, places(start, shape)).to(noisy.device))
            parts.append(self.ref_image_patch_embedder(patchify(reference, sizes.patch)))
            for layer in self.ref_image_refiner:
                parts[1] = layer(parts[1], angles[1], time_T)
            start += max(shape)
        angles.append(turns(sizes, places(start, grid)).to(noisy.device))
        parts.append(self.x_embedder(patchify(noisy, sizes.patch)))
        for layer in self.noise_refiner:
            parts[-1] = layer(parts[-1], angles[-1], time_T)
        x_ND, turns_NC = torch.cat(parts), torch.cat(angles)
        for layer in self.layers:
            x_ND = layer(x_ND, turns_NC, time_T)
        return unpatchify(self.norm_out(x_ND, time_T)[-grid[0] * grid[1] :], grid, sizes.patch)


def places(start: int, grid: tuple[int, int]) -> Tensor:
    """Positions [N, 3] of an image's tokens: the first free place of the sequence, row, column."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.full_like(row, start), row, column], -1).flatten(0, 1)


def turns(sizes: TransformerSizes, places_N3: Tensor) -> Tensor:
    """Complex turns [N, 1, C / 2] of positions on three axes, computed in float64."""
    angles = []
    for axis, channels in enumerate(sizes.axes):
        rates = sizes.rope_theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(places_N3[:, axis, None] * rates)
    turned = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(turned), turned).to(torch.complex64)[:, None]


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[channels, height, width] to tokens [N, patch * patch * channels], channels innermost."""
    channels, height, width = latents.shape
    blocks = latents.view(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Undoes `patchify`."""
    blocks = tokens.view(*grid, patch, patch, -1).permute(4, 0, 2, 1, 3)
    return blocks.reshape(-1, grid[0] * patch, grid[1] * patch)


class _TimeAndCondition(nn.Module):
    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {
                "linear_1": nn.Linear(FREQUENCIES, sizes.time_width),
                "linear_2": nn.Linear(sizes.time_width, sizes.time_width),
            }
        )
        self.caption_embedder = nn.Sequential(
            nn.RMSNorm(sizes.condition, eps=EPS), nn.Linear(sizes.condition, sizes.width)
        )

    def forward(self, time: float, condition: Tensor) -> tuple[Tensor, Tensor]:
        half = FREQUENCIES // 2
        rates = 1e4 ** -(torch.arange(half, device=condition.device) / half)
        angles = TIME_SCALE * time * rates
        sinusoid = torch.cat([angles.cos(), angles.sin()]).to(condition.dtype)
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        return second(silu(first(sinusoid))), self.caption_embedder(condition)


class _Layer(nn.Module):
    """x += tanh(gate) * norm2(attention(norm1(x) * (1 + scale))), then the same with the MLP; or without modulation."""

    def __init__(self, sizes: TransformerSizes, *, modulated: bool = True) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.mlp_width
        self.attn = _Attention(sizes)
        self.feed_forward = nn.ModuleDict(
            {
                "linear_1": nn.Linear(width, inner, bias=False),
                "linear_2": nn.Linear(inner, width, bias=False),
                "linear_3": nn.Linear(width, inner, bias=False),
            }
        )
        norm = nn.RMSNorm(width, eps=EPS)
        self.norm1 = (
            nn.ModuleDict({"linear": nn.Linear(sizes.time_width, 4 * width), "norm": norm}) if modulated else norm
        )
        self.norm2, self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(width, eps=EPS) for _ in range(3))

    def forward(self, x_ND: Tensor, turns_NC: Tensor, time_T: Tensor) -> Tensor:
        if isinstance(self.norm1, nn.ModuleDict):
            scale1, gate1, scale2, gate2 = self.norm1["linear"](silu(time_T)).chunk(4)
            before = self.norm1["norm"](x_ND) * (1 + scale1)
            x_ND = x_ND + gate1.tanh() * self.norm2(self.attn(before, turns_NC))
            return x_ND + gate2.tanh() * self.ffn_norm2(self._mlp(self.ffn_norm1(x_ND) * (1 + scale2)))
        x_ND = x_ND + self.norm2(self.attn(self.norm1(x_ND), turns_NC))
        return x_ND + self.ffn_norm2(self._mlp(self.ffn_norm1(x_ND)))

    def _mlp(self, x_ND: Tensor) -> Tensor:
        gate, down, up = (self.feed_forward[f"linear_{i}"] for i in (1, 2, 3))
        out: Tensor = down(silu(gate(x_ND)) * up(x_ND))
        return out


class _Attention(nn.Module):
    """Queries and keys normalised a head, several queries to a key."""

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        channels = sum(sizes.axes)
        self.channels, self.shared = channels, sizes.heads // sizes.kv_heads
        self.to_q = nn.Linear(sizes.width, sizes.heads * channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(sizes.width, sizes.kv_heads * channels, bias=False) for _ in range(2))
        self.norm_q, self.norm_k = nn.RMSNorm(channels, eps=EPS), nn.RMSNorm(channels, eps=EPS)
        self.to_out = nn.ModuleList([nn.Linear(sizes.heads * channels, sizes.width, bias=False)])

    def forward(self, x_ND: Tensor, turns_NC: Tensor) -> Tensor:
        q, k, v = (p(x_ND).unflatten(1, (-1, self.channels)) for p in (self.to_q, self.to_k, self.to_v))
        q, k = _turn(self.norm_q(q), turns_NC), _turn(self.norm_k(k), turns_NC)
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return self.to_out[0](scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))


class _Out(nn.Module):
    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        self.width = sizes.width
        self.linear_1 = nn.Linear(sizes.time_width, sizes.width)
        self.linear_2 = nn.Linear(sizes.width, sizes.latent * sizes.patch**2)

    def forward(self, x_ND: Tensor, time_T: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x_ND, (self.width,), eps=1e-6)
        return self.linear_2(normed * (1 + self.linear_1(silu(time_T))))


def _turn(x_NHC: Tensor, turns_NC: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_NHC.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_NC).flatten(-2).to(x_NHC.dtype)
