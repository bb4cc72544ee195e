"""The released image refiner: its transformer against a plain formula, its steps, guidance and autoencoder."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_model.released.refiner import Refiner
from longcat_model.released.refiner_transformer import Transformer, patchify, places, unpatchify
from longcat_model.released.sizes import TransformerSizes, VAESizes
from longcat_model.released.vae import VAE
from longcat_model.tokenizers.vision.packing import Layout

SIZES = TransformerSizes(
    width=36, layers=2, refiners=1, heads=4, kv_heads=2, axes=(4, 2, 2), mlp_multiple=8,
    time_width=16, condition=20, latent=4,
)  # fmt: skip
LATENTS = VAESizes(widths=(4, 4, 8, 8), groups=2, latent=4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(**options: object) -> Refiner:
    return Refiner(SIZES, LATENTS, codeword=24, patch=4, merge=2, steps=4, **options)  # type: ignore[arg-type]


class Formula:
    """The transformer from its weights by name."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.state[f"{name}.weight"]

    def turn(self, x_NC: Tensor, where: Tensor) -> Tensor:
        out, start = x_NC.clone(), 0
        for axis, channels in enumerate(SIZES.axes):
            for j in range(channels // 2):
                angle = where[:, axis] * 1e4 ** (-2 * j / channels)
                a, b = x_NC[:, start + 2 * j], x_NC[:, start + 2 * j + 1]
                out[:, start + 2 * j] = a * angle.cos() - b * angle.sin()
                out[:, start + 2 * j + 1] = a * angle.sin() + b * angle.cos()
            start += channels
        return out

    def attend(self, x: Tensor, where: Tensor, name: str) -> Tensor:
        q, k, v = (self.linear(x, f"{name}.to_{p}").split(sum(SIZES.axes), 1) for p in "qkv")
        outputs = []
        for head, q_NC in enumerate(q):
            key = head // (SIZES.heads // SIZES.kv_heads)
            turned = self.turn(self.norm(q_NC, f"{name}.norm_q"), where)
            scores = turned @ self.turn(self.norm(k[key], f"{name}.norm_k"), where).T / math.sqrt(sum(SIZES.axes))
            outputs.append(scores.softmax(1) @ v[key])
        return self.linear(torch.cat(outputs, 1), f"{name}.to_out.0")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gated = F.silu(self.linear(x, f"{name}.linear_1")) * self.linear(x, f"{name}.linear_3")
        return self.linear(gated, f"{name}.linear_2")

    def layer(self, x: Tensor, where: Tensor, name: str, time: Tensor | None) -> Tensor:
        scale1 = scale2 = torch.zeros(SIZES.width)
        gate1 = gate2 = torch.full((SIZES.width,), torch.inf)
        norm1 = f"{name}.norm1"
        if time is not None:
            scale1, gate1, scale2, gate2 = self.linear(F.silu(time), f"{name}.norm1.linear").split(SIZES.width)
            norm1 = f"{name}.norm1.norm"
        attended = self.attend(self.norm(x, norm1) * (1 + scale1), where, f"{name}.attn")
        x = x + gate1.tanh() * self.norm(attended, f"{name}.norm2")
        inner = self.mlp(self.norm(x, f"{name}.ffn_norm1") * (1 + scale2), f"{name}.feed_forward")
        return x + gate2.tanh() * self.norm(inner, f"{name}.ffn_norm2")

    def __call__(self, noisy: Tensor, reference: Tensor | None, condition: Tensor, t: float) -> Tensor:
        angles = torch.tensor([1000 * t * 1e4 ** (-i / 128) for i in range(128)])
        embed = "time_caption_embed.timestep_embedder"
        time = self.linear(torch.cat([angles.cos(), angles.sin()]), f"{embed}.linear_1")
        time = self.linear(F.silu(time), f"{embed}.linear_2")
        text = self.norm(condition, "time_caption_embed.caption_embedder.0")
        text = self.linear(text, "time_caption_embed.caption_embedder.1")
        start = len(text)
        wheres = [torch.tensor([[i, i, i] for i in range(start)]).float()]
        tokens = [self.layer(text, wheres[0], "context_refiner.0", None)]
        for name, image in (("ref_image", reference), ("noise", noisy)):
            if image is None:
                continue
            rows, columns = image.shape[1] // 2, image.shape[2] // 2
            where = torch.tensor([[start, r, c] for r in range(rows) for c in range(columns)]).float()
            flat = [
                torch.stack([image[:, 2 * r + a, 2 * c + b] for a in (0, 1) for b in (0, 1)]).flatten()
                for r in range(rows)
                for c in range(columns)
            ]
            embedder = "x_embedder" if name == "noise" else "ref_image_patch_embedder"
            x = self.linear(torch.stack(flat), embedder)
            tokens.append(self.layer(x, where, f"{name}_refiner.0", time))
            wheres.append(where)
            start += max(rows, columns)
        x, where = torch.cat(tokens), torch.cat(wheres)
        for i in range(SIZES.layers):
            x = self.layer(x, where, f"layers.{i}", time)
        x = F.layer_norm(x, (SIZES.width,), eps=1e-6) * (1 + self.linear(F.silu(time), "norm_out.linear_1"))
        out, velocity = self.linear(x, "norm_out.linear_2")[-len(tokens[-1]) :], torch.empty_like(noisy)
        for i, token in enumerate(out):
            r, c = divmod(i, noisy.shape[2] // 2)
            velocity[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = token.view(2, 2, -1).permute(2, 0, 1)
        return velocity


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_the_transformer_follows_its_formula(guided: bool) -> None:
    transformer = Transformer(SIZES)
    for name, parameter in transformer.named_parameters():
        if name.endswith("norm1.linear.weight"):
            nn.init.normal_(parameter, std=0.5)  # gates that are open
    noisy, reference, condition = torch.randn(4, 4, 6), torch.randn(4, 4, 6), torch.randn(5, 20)
    reference = reference if guided else None  # type: ignore[assignment]
    expected = Formula(transformer.state_dict())(noisy, reference, condition, 0.4)
    torch.testing.assert_close(transformer(noisy, reference, condition, 0.4), expected, rtol=1e-4, atol=2e-5)


def test_tokens_are_patches_and_back() -> None:
    image = torch.randn(4, 6, 8)
    assert torch.equal(unpatchify(patchify(image, 2), (3, 4), 2), image)
    assert places(7, (1, 2)).tolist() == [[7, 0, 0], [7, 0, 1]]


def test_the_time_shift_is_inert_with_the_released_quirks() -> None:
    assert small().times(16_900) == [0, 0.25, 0.5, 0.75, 1]
    m = math.sqrt(16_900) / 40
    assert small(quirks="none").times(16_900) == pytest.approx([t / (m - m * t + t) for t in (0, 0.25, 0.5, 0.75, 1)])


class Velocities(nn.Module):
    """Constant velocities: 1 freely, 3 with a first image, 10 with a condition besides."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.times = SIZES, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, reference: Tensor | None, condition: Tensor, time: float) -> Tensor:
        self.times.append(time)
        has_condition = bool(condition.any())
        assert reference is not None or not has_condition
        return torch.full_like(x, 10.0 if has_condition else 1.0 if reference is None else 3.0)


def test_steps_are_guided_by_the_first_image_and_by_the_condition() -> None:
    refiner = small()
    refiner.base_transformer = velocities = Velocities()  # type: ignore[assignment]
    x = torch.randn(4, 2, 2)
    out = refiner._flow(x, torch.zeros_like(x), torch.ones(3, 20))
    torch.testing.assert_close(out, x + 1 + 1.5 * (3 - 1) + 1.5 * (10 - 3))
    assert velocities.times == [0, 0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75]


@torch.no_grad()
def test_images_of_any_size_are_refined_by_themselves() -> None:
    """Sides that are no multiples of 16 come back as they were."""
    refiner, layout = small(), Layout.of(((3, 1), (2, 3)), 2)
    coarse, codewords = torch.rand(36, 48), torch.randn(9, 24)
    refined = refiner.sample(coarse, codewords, layout, seed=3)
    assert refined.shape == coarse.shape
    alone = refiner.sample(coarse[:12], codewords[:3], Layout.of(((3, 1),), 2), seed=3)
    assert torch.equal(refined[:12], alone)
    assert not torch.equal(alone, refiner.sample(coarse[:12], codewords[:3], Layout.of(((3, 1),), 2), seed=4))


@torch.no_grad()
def test_the_transformer_may_be_bfloat16() -> None:
    refiner, layout = small(), Layout.of(((2, 2),), 2)
    coarse, codewords = torch.rand(16, 48), torch.randn(4, 24)
    expected = refiner.sample(coarse, codewords, layout, seed=3)
    refiner.base_transformer.bfloat16()
    refiner.cond_proj.bfloat16()
    got = refiner.sample(coarse, codewords, layout, seed=3)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)


@torch.no_grad()
def test_latents_are_the_posterior_scaled() -> None:
    vae, image = VAE(LATENTS), torch.rand(1, 3, 16, 24)
    mean, log_variance = vae.encoder(image).chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    expected = (mean + noise * (log_variance / 2).exp() - 0.1159) * 0.3611
    got = vae.encode(image, torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(vae.decode(got), vae.decoder(got / 0.3611 + 0.1159))
    assert vae.decode(got).shape == image.shape


@torch.no_grad()
def test_the_autoencoders_blocks_follow_their_formulas() -> None:
    vae, x = VAE(LATENTS), torch.randn(1, 4, 5, 6)
    stage = vae.encoder.down_blocks[1]

    def norm(x: Tensor, layer: nn.Module) -> Tensor:
        groups = x.view(2, -1)
        scaled = (groups - groups.mean(1, True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled.view_as(x) * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    expected = x
    for block in stage.resnets:
        inner = F.conv2d(F.silu(norm(expected, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
        inner = F.conv2d(F.silu(norm(inner, block.norm2)), block.conv2.weight, block.conv2.bias, padding=1)
        expected = expected + inner
    down = stage.downsamplers[0].conv
    expected = F.conv2d(F.pad(expected, (0, 1, 0, 1)), down.weight, down.bias, stride=2)
    torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
    attention, x = vae.decoder.mid_block.attentions[0], torch.randn(1, 8, 2, 3)
    flat = norm(x, attention.group_norm).flatten(2)[0].T
    q, k, v = (F.linear(flat, p.weight, p.bias) for p in (attention.to_q, attention.to_k, attention.to_v))
    out = F.linear((q @ k.T / math.sqrt(8)).softmax(1) @ v, attention.to_out[0].weight, attention.to_out[0].bias)
    torch.testing.assert_close(attention(x), x + out.T.view_as(x), rtol=1e-4, atol=1e-5)


def test_the_released_sizes() -> None:
    """3.967 B and 7.3 M parameters by the spec; the autoencoder's are those of Flux's."""
    with torch.device("meta"):
        refiner = Refiner(TransformerSizes(), VAESizes(), codeword=3584, patch=14, merge=2)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in refiner.named_children()}
    assert counts == {"base_transformer": 3_967_148_800, "cond_proj": 7_342_080, "vae": 83_819_683}
    assert TransformerSizes().mlp_width == 10_240
    assert {
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.bias",
    } <= set(refiner.vae.state_dict())
