"""The vision tokenizer: packing, parity with transformers' tower, isolation of images, codes and their errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from longcat_model import presets
from longcat_model.tokenizers.vision import VisionTokenizer
from longcat_model.tokenizers.vision.encoder import MEAN, STD, Encoder
from longcat_model.tokenizers.vision.packing import Layout, Segments, attend, patchify, rotary, unpatchify
from longcat_model.tokenizers.vision.quantizer import Quantizer
from longcat_model.tokenizers.vision.refiner import Refiner

SIZES = presets.tiny().vision
GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)


@pytest.fixture
def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(SIZES).eval()


def images_of(grids: list[tuple[int, int]], cell: int = SIZES.cell) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h * cell, w * cell, generator=generator) for h, w in grids]


@settings(deadline=None, max_examples=20)
@given(grids=GRIDS)
def test_unpatchify_undoes_patchify(grids: list[tuple[int, int]]) -> None:
    images = images_of(grids)
    patches, layout = patchify(images, 4, 2)
    assert layout.grids == tuple(grids)
    assert all(torch.equal(a, b) for a, b in zip(unpatchify(patches, layout, 4), images, strict=True))


def test_patches_of_a_position_are_adjacent_rows() -> None:
    image = torch.arange(64.0).view(1, 8, 8)
    patches, layout = patchify([image], 2, 2)
    assert patches[:4].sort().values.flatten().tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 16, 17, 24, 25, 18, 19, 26, 27]
    assert layout.row[:4].tolist() == [0, 0, 1, 1] and layout.column[:4].tolist() == [0, 1, 0, 1]
    assert layout.cu_seqlens.tolist() == [0, 16]


@settings(deadline=None, max_examples=20)
@given(grids=GRIDS, side=st.integers(1, 4))
def test_attention_in_segments_equals_attention_under_a_mask(grids: list[tuple[int, int]], side: int) -> None:
    layout = Layout.of(grids, 2)
    qkv = torch.randn(len(layout.row), 3, 2, 8, generator=torch.Generator().manual_seed(2))
    cos, sin = rotary(layout, 8, 100.0)
    same = layout.image[:, None] == layout.image
    for coordinate in (layout.row, layout.column):
        same &= coordinate[:, None] // side == coordinate // side
    first, second = qkv[:, :2].chunk(2, dim=-1)
    turned = qkv[:, :2] * cos + torch.cat([-second, first], -1) * sin.abs().copysign(sin[..., 4:].repeat(1, 1, 1, 2))
    scores = torch.einsum("qhc,khc->hqk", turned[:, 0], turned[:, 1]) / 8**0.5
    expected = torch.einsum("hqk,khc->qhc", scores.masked_fill(~same, -torch.inf).softmax(-1), qkv[:, 2])
    torch.testing.assert_close(attend(qkv, layout.windows(side), cos, sin), expected, atol=1e-5, rtol=1e-5)


def test_segments_group_by_length() -> None:
    segments = Segments.of(torch.tensor([0, 0, 1, 2, 2]))
    assert segments.order is not None and segments.order.tolist() == [2, 0, 1, 3, 4]
    assert segments.shapes == ((1, 1), (2, 2))
    assert Segments.of(torch.tensor([0, 1, 1])) == Segments(None, None, ((1, 1), (1, 2)))


def test_a_transformers_state_dict_loads_unchanged_and_gives_the_same_features(tokenizer: VisionTokenizer) -> None:
    sizes = SIZES.encoder
    torch.manual_seed(3)
    tower = Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=sizes.depth,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_heads=sizes.heads,
            patch_size=sizes.patch,
            window_size=sizes.window,
            out_hidden_size=sizes.bridge_width,
            fullatt_block_indexes=list(sizes.full_attention),
            initializer_range=0.2,
        )
    ).eval()
    tokenizer.encoder.visual_model.load_state_dict(tower.state_dict())
    patches, layout = tokenizer.patches(images_of([(5, 3), (1, 2), (2, 2), (3, 7)]))
    pixels = (patches.unflatten(1, (3, -1)) - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]
    frames = pixels[:, :, None].expand(-1, -1, 2, -1).flatten(1)
    with torch.no_grad():
        theirs = tower(frames, grid_thw=torch.tensor([[1, 2 * h, 2 * w] for h, w in layout.grids])).pooler_output
        ours = tokenizer.encoder(patches, layout).bridged
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_released_sizes_give_the_released_parameter_counts() -> None:
    sizes = presets.longcat_next().vision
    with torch.device("meta"):
        encoder = Encoder(sizes.encoder).visual_model
        quantizer = Quantizer(sizes.quantizer, sizes.encoder.bridge_width)
    counts = [sum(p.numel() for p in module.parameters()) for module in (encoder, encoder.merger, quantizer.quant_conv)]
    assert counts == [631_975_680 + 44_574_464, 44_574_464, 25_704_448]


@settings(deadline=None, max_examples=10)
@given(grids=GRIDS)
def test_codes_have_one_row_of_levels_a_position(grids: list[tuple[int, int]]) -> None:
    tokenizer = VisionTokenizer(SIZES)
    codes = tokenizer.encode(images_of(grids))
    assert [tuple(x.shape) for x in codes] == [(h, w, 3) for h, w in grids]
    images = tokenizer.decode(codes)
    assert [tuple(x.shape) for x in images] == [(3, h * SIZES.cell, w * SIZES.cell) for h, w in grids]
    assert all(x.min() >= 0 and x.max() <= 1 for x in images)


def test_an_image_does_not_see_its_batch_mates(tokenizer: VisionTokenizer) -> None:
    images = images_of([(2, 3), (1, 1), (3, 2)])
    other = [images[0], *images_of([(4, 4), (2, 2)])]
    together, apart = (tokenizer.features(x).bridged[:6] for x in (images, other))
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    codes = tokenizer.encode(images)
    assert torch.equal(codes[0], tokenizer.encode(other)[0])
    tokenizer.refiner.head.weight.data.normal_(std=0.1)
    alone = tokenizer.decode(codes[1:2], seed=5)[0]
    torch.testing.assert_close(tokenizer.decode(codes, seed=5)[1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokenizer.decode(codes, seed=6)[1], alone)


def test_the_first_levels_alone_decode(tokenizer: VisionTokenizer) -> None:
    codes = tokenizer.encode(images_of([(2, 2)]))
    masked = [codes[0].masked_fill(torch.arange(3) >= 1, -1)]
    assert torch.equal(tokenizer.decode(codes, levels=1)[0], tokenizer.decode(masked)[0])
    assert torch.equal(tokenizer.decode(codes, levels=3)[0], tokenizer.decode(codes)[0])
    assert tokenizer.encode([]) == [] and tokenizer.decode([]) == []


@pytest.mark.parametrize("steps", [2, 28])
def test_an_untrained_refiner_changes_nothing(tokenizer: VisionTokenizer, steps: int) -> None:
    tokenizer.refiner.sizes = replace(SIZES.refiner, steps=steps)
    codes = tokenizer.encode(images_of([(2, 2)]))
    coarse, refined = (tokenizer.decode(codes, refine=refine)[0] for refine in (False, True))
    torch.testing.assert_close(coarse, refined, atol=1e-5, rtol=1e-5)


def test_the_flow_loss_is_that_of_the_linear_path() -> None:
    refiner = Refiner(SIZES.refiner, codeword=16, patch=4, merge=2)
    layout = Layout.of([(1, 2), (2, 2)], 2)
    image, codewords = torch.rand(24, 48), torch.randn(6, 16)
    torch.manual_seed(4)
    assert refiner.loss(image, image, codewords, layout) < 1e-8  # the image itself as the condition leaves nothing
    torch.manual_seed(4)
    loss = refiner.loss(image, torch.zeros_like(image), codewords, layout)
    torch.manual_seed(4)
    torch.randn_like(image)
    remaining = (1 - torch.rand(2)).clamp_min(0.05)[layout.image, None]
    torch.testing.assert_close(loss, (2 * image / remaining).square().mean())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.rand(3, 8, 12)], r"sides multiples of 8, got \[3, 8, 12\]"),
        ([torch.rand(8, 8)], r"must be \[channels, height, width\]"),
    ],
)
def test_encode_refuses_what_it_cannot_cut(tokenizer: VisionTokenizer, images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("codes", "levels", "message"),
    [
        (torch.zeros(2, 2, 2, dtype=torch.int64), None, r"codes must be int64 \[h, w, 3\]"),
        (torch.zeros(2, 2, 3), None, r"codes must be int64"),
        (torch.full((2, 2, 3), 8), None, r"codes must be below \(8, 8, 8\) or -1, got 8..8"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), 4, r"levels must be in 1..3, got 4"),
    ],
)
def test_decode_refuses_codes_it_does_not_know(
    tokenizer: VisionTokenizer, codes: Tensor, levels: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([codes], levels=levels)
