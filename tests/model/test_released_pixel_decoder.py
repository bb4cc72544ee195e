"""The released pixel decoder against a plain formula over its weights, with and without each quirk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_model import config, presets
from longcat_model.released.pixel_decoder import PixelDecoder, positions
from longcat_model.tokenizers.vision.encoder import MEAN, STD
from longcat_model.tokenizers.vision.packing import Layout

SIZES = config.PixelDecoder(width=32, depth=2, heads=2, mlp_width=40)
PATCH, MERGE, CODEWORD = 4, 2, 24
GRIDS = ((1, 2), (2, 1), (2, 3))
RASTER_2x1 = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
GROUPS_1x2 = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def decoder(quirks: str) -> PixelDecoder:
    torch.manual_seed(0)
    made = PixelDecoder(SIZES, codeword=CODEWORD, patch=PATCH, merge=MERGE, quirks=quirks)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            nn.init.normal_(parameter, std=0.5)  # attention that is far from even
    return made


def formula(state: dict[str, Tensor], codewords_MZ: Tensor, places: list[tuple[int, int]], scale: float) -> Tensor:
    """Patches of one image: positions of the vectors and the scale of attention are given."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}.weight"]

    def turn(x_TC: Tensor) -> Tensor:
        channels = x_TC.shape[1]
        out = torch.empty_like(x_TC)
        for i, place in enumerate(places):
            for pair in range(channels // 2):
                axis, j = divmod(pair, channels // 4)
                angle = place[axis] * 1e4 ** (-j / (channels // 4))
                a, b = x_TC[i, 2 * pair], x_TC[i, 2 * pair + 1]
                out[i, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[i, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = norm(linear(codewords_MZ, "post_quant_conv.0"), "post_quant_conv.1")
    x = linear(F.gelu(linear(norm(x, "patch_unmerger.0"), "patch_unmerger.1")), "patch_unmerger.3")
    x = norm(x.reshape(-1, SIZES.width), "norm_in")
    for i in range(SIZES.depth):
        layer = f"layers.{i}."
        q, k, v = (linear(norm(x, f"{layer}norm1"), f"{layer}{p}_proj").chunk(SIZES.heads, 1) for p in "qkv")
        heads = [((turn(a) @ turn(b).T) * scale).softmax(1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = x + linear(norm(torch.cat(heads, 1), f"{layer}inner_attn_ln"), f"{layer}out_proj")
        normed = norm(x, f"{layer}norm2")
        gated = F.silu(linear(normed, f"{layer}w1")) * linear(normed, f"{layer}w2")
        x = x + linear(norm(gated, f"{layer}ffn_ln"), f"{layer}w3")
    pixels = linear(F.gelu(linear(norm(x, "norm_out"), "head.0")), "head.2").view(-1, 3, 2, PATCH**2)[:, :, 0]
    return (pixels * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]).flatten(1)


def in_groups(height: int, width: int) -> list[tuple[int, int]]:
    return [(2 * r + a, 2 * c + b) for r in range(height) for c in range(width) for a in (0, 1) for b in (0, 1)]


def in_raster(height: int, width: int) -> list[tuple[int, int]]:
    return [(r, c) for r in range(2 * height) for c in range(2 * width)]


@torch.no_grad()
@pytest.mark.parametrize(("quirks", "tolerance"), [("released", 4e-3), ("none", 2e-5)])
def test_it_follows_its_formula(quirks: str, tolerance: float) -> None:
    """With the quirks within what float16 leaves of queries, keys and values; either quirk alone is off by far more."""
    made, layout = decoder(quirks), Layout.of(GRIDS, MERGE)
    codewords = torch.randn(sum(layout.positions), CODEWORD)
    got, channels = made(codewords, layout), SIZES.width // SIZES.heads
    runs, patches = codewords.split(layout.positions), got.split([4 * n for n in layout.positions])
    for grid, run, image in zip(GRIDS, runs, patches, strict=True):
        state, orders = made.state_dict(), {"released": in_raster(*grid), "none": in_groups(*grid)}
        scales = {"released": 1 / channels, "none": channels**-0.5}
        expected = formula(state, run, orders[quirks], scales[quirks])
        torch.testing.assert_close(image, expected, rtol=0, atol=tolerance)
        other = "none" if quirks == "released" else "released"
        assert (image - formula(state, run, orders[quirks], scales[other])).abs().max() > 5 * tolerance
        if grid == (2, 3):  # smaller ones have nearly or exactly the same order
            assert (image - formula(state, run, orders[other], scales[quirks])).abs().max() > 5 * tolerance


@torch.no_grad()
def test_attention_is_in_float16_with_the_quirks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_model.released import pixel_decoder

    seen, real = set(), F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update({q.dtype, k.dtype, v.dtype})
        return real(q, k, v)

    monkeypatch.setattr(pixel_decoder, "scaled_dot_product_attention", record)
    layout = Layout.of(((1, 1),), MERGE)
    for quirks, dtype in (("released", torch.float16), ("none", torch.float32)):
        seen.clear()
        decoder(quirks)(torch.randn(1, CODEWORD), layout)
        assert seen == {dtype}


def test_positions_count_through_the_image_or_follow_the_pixels() -> None:
    layout = Layout.of(((2, 1), (1, 2)), MERGE)
    raster = list(zip(*(x.tolist() for x in positions(layout, raster=True)), strict=True))
    assert raster[:8] == RASTER_2x1
    groups = list(zip(*(x.tolist() for x in positions(layout, raster=False)), strict=True))
    assert groups[8:] == GROUPS_1x2


def test_images_do_not_see_each_other() -> None:
    made, one, two = decoder("released"), Layout.of(((1, 2),), MERGE), Layout.of(((1, 2), (2, 2)), MERGE)
    codewords = torch.randn(6, CODEWORD)
    torch.testing.assert_close(made(codewords, two)[:8], made(codewords[:2], one), rtol=0, atol=1e-5)


def test_the_released_size() -> None:
    """0.434 B parameters; keys have no bias."""
    sizes = presets.longcat_next().vision
    with torch.device("meta"):
        made = PixelDecoder(sizes.decoder, codeword=3584, patch=14, merge=2)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(0.434e9, rel=0.002)
    layers = {name.removeprefix("layers.0.") for name in made.state_dict() if name.startswith("layers.0.")}
    assert "k_proj.bias" not in layers and {"q_proj.bias", "v_proj.bias", "out_proj.bias"} <= layers
