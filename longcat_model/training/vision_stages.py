"""Training stages of the vision tokenizer, in order: encoder, quantizer, pixel decoder, refiner.

Each freezes what the ones before it trained. `Settings.smoke()` is the same path in a few steps.

Dimension key
    T patches    M positions    L levels    Q questions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from longcat_model.tokenizers.vision import VisionTokenizer
from longcat_model.tokenizers.vision.answerer import Answerer, Pictures
from longcat_model.tokenizers.vision.encoder import shallow_distance
from longcat_model.tokenizers.vision.metrics import psnr, ssim
from longcat_model.tokenizers.vision.packing import Layout, unpatchify
from longcat_model.training.loop import Stage

Source = Callable[[int, int, bool], Pictures]  # (step, images, whether of one size) -> pictures, a pure function
Losses = tuple[Tensor, dict[str, Tensor]]
LOGGED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length and width of each stage, and the weights of equations (5) and (6), which the report leaves open."""

    sae_steps: int = 500
    one_size_share: float = 0.5  # of the encoder's steps, on images of one size, then of any: the report's two phases
    quantizer_steps: int = 300
    decoder_steps: int = 250
    refiner_steps: int = 200
    images: int = 64  # of every batch; twice that while they are of one size
    sae_rate: float = 3e-3
    quantizer_rate: float = 1e-3
    decoder_rate: float = 2e-3
    refiner_rate: float = 2e-3
    commitment_weight: float = 0.25
    semantic_weight: float = 1.0
    pixel_weight: float = 1.0
    perceptual_weight: float = 0.1
    align_weight: float = 0.5
    whole_code_share: float = 0.5  # of images that the decoder sees with all levels; the rest with a random prefix

    @classmethod
    def smoke(cls) -> Settings:
        return cls(sae_steps=3, quantizer_steps=3, decoder_steps=3, refiner_steps=3, images=8)


def vision_stages(
    tokenizer: VisionTokenizer, answerer: Answerer, source: Source, settings: Settings
) -> tuple[Stage, Stage, Stage, Stage]:
    """All four stages in the order they must run."""
    return (
        vision_sae(tokenizer, answerer, source, settings),
        vision_quantizer(tokenizer, source, settings),
        vision_decoder(tokenizer, source, settings),
        vision_refiner(tokenizer, source, settings),
    )


def vision_sae(tokenizer: VisionTokenizer, answerer: Answerer, source: Source, settings: Settings) -> Stage:
    """Equation (2): the encoder learns from answers to questions about its images; the answerer is dropped later."""

    def batch(step: int) -> Pictures:
        one_size = step < settings.one_size_share * settings.sae_steps
        return source(step, settings.images * (1 + one_size), one_size)

    def loss(pictures: Pictures) -> Losses:
        patches_TP, layout = tokenizer.patches(pictures.images)
        features_MZ = tokenizer.encoder(patches_TP, layout).bridged
        total, right_Q = answerer.loss(features_MZ, layout, pictures.answers)
        return total, {"answers_right": right_Q.mean()}

    return Stage(
        name="vision_sae",
        module=nn.ModuleDict({"tokenizer": tokenizer, "answerer": answerer}),
        parameters=(*tokenizer.encoder.parameters(), *answerer.parameters()),
        batch=batch,
        loss=loss,
        steps=settings.sae_steps,
        learning_rate=settings.sae_rate,
    )


def vision_quantizer(tokenizer: VisionTokenizer, source: Source, settings: Settings) -> Stage:
    """Equations (3) to (5): quant_conv and the light decoder by gradient, codebooks by EMA; the encoder is frozen."""
    quantizer = tokenizer.quantizer

    def loss(pictures: Pictures) -> Losses:
        with torch.no_grad():
            features_MZ = tokenizer.features(pictures.images).bridged
        result = quantizer(features_MZ)
        total = settings.commitment_weight * result.commitment + settings.semantic_weight * result.semantic
        used = {
            f"codes_used_{level}": share for level, share in enumerate(_used(result.codes, quantizer.quantize.sizes))
        }
        return total, {"commitment": result.commitment.detach(), "semantic": result.semantic.detach(), **used}

    return Stage(
        name="vision_quantizer",
        module=tokenizer,
        parameters=tuple(quantizer.parameters()),
        batch=lambda step: source(1_000_000 + step, settings.images, False),
        loss=loss,
        steps=settings.quantizer_steps,
        learning_rate=settings.quantizer_rate,
    )


def vision_decoder(tokenizer: VisionTokenizer, source: Source, settings: Settings) -> Stage:
    """Equation (6): pixels from codewords, by three terms of our choice.

    - pixel: mean absolute plus mean squared difference, of RGB in [0, 1];
    - perceptual: distance of the frozen encoder's states after its first half of blocks (`shallow_distance`);
    - align: one minus the cosine of the frozen encoder's features of the reconstruction and of the original, so that
      what the codes meant can be read from the picture again.

    Images are decoded from a random number of first levels, so that every prefix of the levels gives a picture.
    """

    def loss(pictures: Pictures) -> Losses:
        original_TP, layout = tokenizer.patches(pictures.images)
        with torch.no_grad():
            reference = tokenizer.encoder(original_TP, layout)
            codes_ML = tokenizer.quantizer.encode(reference.bridged)
            codewords_MD = tokenizer.quantizer.decode(_prefixes(codes_ML, layout, settings.whole_code_share))
        rebuilt_TP = tokenizer.decoder(codewords_MD, layout)
        features = tokenizer.encoder(rebuilt_TP, layout)
        difference_TP = rebuilt_TP - original_TP
        pixel = difference_TP.abs().mean() + difference_TP.square().mean()
        perceptual = shallow_distance(features, reference, (len(reference.hidden) + 1) // 2)
        align = 1 - cosine_similarity(features.bridged, reference.bridged, dim=-1).mean()
        total = settings.pixel_weight * pixel + settings.perceptual_weight * perceptual + settings.align_weight * align
        terms = {"pixel": pixel, "perceptual": perceptual, "align": align}
        rebuilt = unpatchify(rebuilt_TP.detach().clamp(0, 1), layout, tokenizer.sizes.encoder.patch)
        return total, {name: term.detach() for name, term in terms.items()} | _closeness(rebuilt, pictures.images)

    return Stage(
        name="vision_decoder",
        module=tokenizer,
        parameters=tuple(tokenizer.decoder.parameters()),
        batch=lambda step: source(2_000_000 + step, settings.images, False),
        loss=loss,
        steps=settings.decoder_steps,
        learning_rate=settings.decoder_rate,
    )


def vision_refiner(tokenizer: VisionTokenizer, source: Source, settings: Settings) -> Stage:
    """Flow matching from noise to the image, given the frozen decoder's image and the codewords."""

    def loss(pictures: Pictures) -> Losses:
        original_TP, layout = tokenizer.patches(pictures.images)
        with torch.no_grad():
            codes_ML = tokenizer.quantizer.encode(tokenizer.encoder(original_TP, layout).bridged)
            codewords_MD = tokenizer.quantizer.decode(_prefixes(codes_ML, layout, settings.whole_code_share))
            coarse_TP = tokenizer.decoder(codewords_MD, layout).clamp(0, 1)
        total = tokenizer.refiner.loss(original_TP, coarse_TP, codewords_MD, layout)
        return total, {}

    return Stage(
        name="vision_refiner",
        module=tokenizer,
        parameters=tuple(tokenizer.refiner.parameters()),
        batch=lambda step: source(3_000_000 + step, settings.images, False),
        loss=loss,
        steps=settings.refiner_steps,
        learning_rate=settings.refiner_rate,
    )


def answers_from_codes(tokenizer: VisionTokenizer, answerer: Answerer, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Equation (1), measured: shares of answers right from continuous features and from codes alone, each [Q].

    Codes reach the answerer through the quantizer's light decoder, which rebuilds the features it was trained on.
    """
    with torch.no_grad():
        patches_TP, layout = tokenizer.patches(pictures.images)
        features_MZ = tokenizer.encoder(patches_TP, layout).bridged
        codewords_MD = tokenizer.quantizer.decode(tokenizer.quantizer.encode(features_MZ))
        rebuilt_MZ = tokenizer.quantizer.semantic_decoder(codewords_MD)
        continuous, discrete = (answerer.loss(x, layout, pictures.answers)[1] for x in (features_MZ, rebuilt_MZ))
    return continuous, discrete


def _prefixes(codes_ML: Tensor, layout: Layout, whole_share: float) -> Tensor:
    """Drops (-1) all but a random number of first levels, the same for all positions of an image."""
    levels = codes_ML.shape[1]
    kept_I = torch.randint(1, levels + 1, (len(layout.grids),))
    kept_I[torch.rand(len(kept_I)) < whole_share] = levels
    kept_M1 = kept_I.to(codes_ML.device)[layout.position_image, None]
    return codes_ML.masked_fill(torch.arange(levels, device=codes_ML.device) >= kept_M1, -1)


def _closeness(images: Sequence[Tensor], references: Sequence[Tensor]) -> dict[str, Tensor]:
    """Metrics of the first images of a batch: enough for a curve."""
    images, references = ([x.cpu() for x in of[:LOGGED_IMAGES]] for of in (images, references))
    return {"psnr": torch.tensor(psnr(images, references)), "ssim": torch.tensor(ssim(images, references))}


def _used(codes_ML: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Share of each level's entries that a batch uses."""
    pairs = zip(codes_ML.unbind(1), sizes, strict=True)
    return [torch.bincount(codes, minlength=size).bool().float().mean() for codes, size in pairs]
