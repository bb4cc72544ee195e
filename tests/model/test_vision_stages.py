"""Training stages of the vision tokenizer: what each moves, its losses, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from longcat_model import presets
from longcat_model.tokenizers.vision import VisionTokenizer
from longcat_model.tokenizers.vision.answerer import IGNORED, Answerer, Pictures
from longcat_model.tokenizers.vision.encoder import shallow_distance
from longcat_model.tokenizers.vision.metrics import psnr, ssim
from longcat_model.tokenizers.vision.packing import Layout
from longcat_model.training import vision_stages as stages
from longcat_model.training.loop import Stage, train
from longcat_model.training.rates import MEASURED
from longcat_model.training.vision_stages import Settings

SIZES = presets.tiny().vision
SMOKE = Settings.smoke()


def source(step: int, images: int, one_size: bool) -> Pictures:
    """Plain images of one of four colours; the answer is the colour, then symbol 4, the end."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.randint(4, (images,), generator=generator)
    palette = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.9]])
    widths = [8 if one_size else 8 * (1 + i % 2) for i in range(images)]
    pictures = [palette[c][:, None, None].expand(3, 8, w).clone() for c, w in zip(colours, widths, strict=True)]
    answers = torch.stack([colours, torch.full_like(colours, 4)], dim=1)[:, None]
    return Pictures(pictures, answers)


@pytest.fixture
def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(SIZES)


@pytest.fixture
def answerer() -> Answerer:
    torch.manual_seed(1)
    return Answerer(features=SIZES.encoder.bridge_width, questions=1, symbols=5, longest=2, width=16)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the parts of the tokenizer that changed."""
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    return {name.split(".")[0] for name in changed}


@pytest.mark.parametrize(
    ("name", "parts"), [("quantizer", {"quantizer"}), ("decoder", {"decoder"}), ("refiner", {"refiner"})]
)
def test_a_stage_moves_its_part_alone(tokenizer: VisionTokenizer, tmp_path: Path, name: str, parts: set[str]) -> None:
    stage = getattr(stages, f"vision_{name}")(tokenizer, source, SMOKE)
    before = snapshot(tokenizer)
    train(stage, tmp_path, quiet=True)
    assert moved(before, tokenizer.state_dict()) == parts


def test_the_encoder_learns_from_answers(tokenizer: VisionTokenizer, answerer: Answerer, tmp_path: Path) -> None:
    settings = Settings(sae_steps=40, images=8, sae_rate=1e-2)
    before = snapshot(tokenizer)
    rows = train(stages.vision_sae(tokenizer, answerer, source, settings), tmp_path, quiet=True)
    assert moved(before, tokenizer.state_dict()) == {"encoder"}
    assert rows[0]["loss"] > 1 and rows[-1]["loss"] < 0.1
    assert rows[-1]["answers_right"] == 1


def test_the_stages_in_order_give_a_tokenizer(tokenizer: VisionTokenizer, answerer: Answerer, tmp_path: Path) -> None:
    steps = {"sae_steps": 30, "quantizer_steps": 80, "decoder_steps": 60, "refiner_steps": 5}
    settings = Settings(**steps, images=8, sae_rate=1e-2, quantizer_rate=5e-3)  # type: ignore[arg-type]
    rows = [train(s, tmp_path, quiet=True) for s in stages.vision_stages(tokenizer, answerer, source, settings)]
    assert {"commitment", "semantic", "codes_used_0", "codes_used_2"} <= set(rows[1][0])
    pictures = source(10_000, 8, False)
    continuous, discrete = stages.answers_from_codes(tokenizer, answerer, pictures)
    assert continuous.min() == 1 and discrete.min() == 1
    rebuilt = tokenizer.decode(tokenizer.encode(pictures.images), refine=False)
    assert psnr(rebuilt, pictures.images) > rows[2][0]["psnr"] + 4
    assert rows[2][-1]["pixel"] < 0.7 * rows[2][0]["pixel"] and {"psnr", "ssim"} <= set(rows[2][0])


def test_an_interrupted_stage_resumes_exactly(tmp_path: Path) -> None:
    def fresh() -> Stage:
        torch.manual_seed(0)
        return stages.vision_quantizer(VisionTokenizer(SIZES), source, Settings(quantizer_steps=6, images=8))

    def fails_at_4(step: int) -> Pictures:
        if step == 4:
            raise KeyboardInterrupt
        return source(1_000_000 + step, 8, False)

    def computed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]

    whole = train(fresh(), tmp_path / "whole", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        train(replace(fresh(), batch=fails_at_4), tmp_path / "resumed", quiet=True, save_every=1)
    assert computed(train(fresh(), tmp_path / "resumed", quiet=True)) == computed(whole)


def test_the_quantizer_losses_are_equations_3_to_5(tokenizer: VisionTokenizer) -> None:
    quantizer = tokenizer.quantizer.eval()
    features = torch.randn(10, SIZES.encoder.bridge_width, requires_grad=True)
    result = quantizer(features)
    start = quantizer.quant_conv(features)
    partial = [quantizer.decode(result.codes, levels) for levels in (1, 2, 3)]
    commitment = torch.stack([(start - q).square().mean() for q in partial]).mean()
    torch.testing.assert_close(result.commitment, commitment)
    semantic = 1 - cosine_similarity(quantizer.semantic_decoder(partial[-1]), features, dim=-1).mean()
    torch.testing.assert_close(result.semantic, semantic)
    result.semantic.backward()
    (gradient,) = torch.autograd.grad(quantizer(features.detach()).semantic, [quantizer.quant_conv[3].weight])
    assert gradient.abs().max() > 0 and features.grad is not None


def test_prefixes_keep_first_levels_of_whole_images() -> None:
    torch.manual_seed(0)
    layout = Layout.of([(1, 2)] * 200, 2)
    codes = stages._prefixes(torch.ones(400, 3, dtype=torch.int64), layout, 0.5)
    kept = (codes >= 0).sum(1).view(200, 2)
    assert torch.equal(kept[:, 0], kept[:, 1]) and set(kept.flatten().tolist()) == {1, 2, 3}
    assert torch.equal(codes >= 0, torch.arange(3) < kept.flatten()[:, None])
    assert 0.55 < (kept[:, 0] == 3).float().mean() < 0.8


def test_answers_are_read_from_left_to_right_and_from_their_image_alone(answerer: Answerer) -> None:
    layout = Layout.of([(1, 3), (1, 1)], 2)
    features = torch.randn(4, SIZES.encoder.bridge_width)
    answers = torch.tensor([[[1, 4]], [[2, 4]]])
    logits = answerer(features, layout, answers)
    changed = answerer(features, layout, torch.tensor([[[3, 4]], [[2, 4]]]))
    torch.testing.assert_close(logits[0, :, 0], changed[0, :, 0])
    assert not torch.allclose(logits[0, :, 1], changed[0, :, 1])
    alone = answerer(features[3:], Layout.of([(1, 1)], 2), answers[1:])
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=1e-5)
    loss, _ = answerer.loss(features, layout, torch.tensor([[[1, IGNORED]], [[2, IGNORED]]]))
    torch.testing.assert_close(loss, -logits[..., 0, :].log_softmax(-1)[[0, 1], 0, [1, 2]].mean())


def test_shallow_distance_is_zero_for_equal_images_and_reads_only_the_first_blocks(tokenizer: VisionTokenizer) -> None:
    patches, layout = tokenizer.patches([torch.rand(3, 8, 16)])
    features = tokenizer.encoder(patches, layout)
    other = tokenizer.encoder(1 - patches, layout)
    assert shallow_distance(features, features, 2) == 0 and shallow_distance(other, features, 1) > 0
    mixed = features._replace(hidden=(features.hidden[0], other.hidden[1]))
    assert shallow_distance(mixed, features, 1) == 0


def test_psnr_and_ssim_of_known_images() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert psnr([torch.full_like(image, 0.5)], [torch.full_like(image, 0.6)]) == pytest.approx(20, abs=1e-3)
    noisy = (image + 0.2 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    library = structural_similarity(noisy.numpy(), image.numpy(), channel_axis=0, data_range=1.0)
    assert ssim([noisy], [image]) == pytest.approx(library, abs=1e-5)
    with pytest.raises(ValueError, match="at least 7 pixels"):
        ssim([image[:, :6]], [image[:, :6]])
