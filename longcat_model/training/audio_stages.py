"""Training stages of the audio tokenizer: report section 4.1.2, losses of equation (8).

1. `warm_up`: no quantizer. The report trains the decoder alone, on the features of a frozen pretrained Whisper encoder;
   nothing pretrained can be fetched offline, so the encoder starts here too, and the answer decoder with it, which
   stands for Whisper's own training on transcripts.
2. `joint`: quantizer on, all three losses. Each clip keeps a random number of levels, so that every prefix of levels
   reconstructs and the first carries what was said.
3. `flow`: everything else frozen, the refiner learns to turn the decoder's coarse mel into the true one. The report
   moves to 24 kHz audio here and makes the decoder a diffusion transformer; this one stays at the encoder's rate.

Dimension key
    B clips    M mels    S mel frames    T positions    L quantizer levels    Q codeword width    A answer tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.audio.answers import IGNORED
from longcat_model.tokenizers.audio.decoder import mel_loss
from longcat_model.tokenizers.audio.encoder import length_mask
from longcat_model.tokenizers.audio.tokenizer import Mels
from longcat_model.training.loop import Stage

# step -> waveforms [samples] and the answer tokens of each; a pure function of the step
Source = Callable[[int], tuple[Sequence[Tensor], Sequence[Sequence[int]]]]


@dataclass(frozen=True, kw_only=True)
class AudioTraining:
    """Steps, rates and the weights of equation (8); the report gives none of them."""

    warm_up_steps: int = 200
    joint_steps: int = 450
    flow_steps: int = 220
    learning_rate: float = 2e-3
    mel_weight: float = 1.0
    commitment_weight: float = 0.25
    language_weight: float = 0.3  # 0: no language term
    full_share: float = 0.5  # of the clips in `joint`, how many keep all levels; the others keep a random prefix


class AudioBatch(NamedTuple):
    """Clips ready to learn from."""

    mels: Mels
    answers: Tensor  # [B, A] int64, IGNORED beyond each answer


class AudioTrainee(nn.Module):
    """The tokenizer and its answer decoder as one module, so that one checkpoint holds both.

    `language` is any module with the call (features, positions, answers) -> mean negative log-likelihood; for a frozen
    LLM, clear `requires_grad` of its parameters and it stays as it is.
    """

    def __init__(self, tokenizer: AudioTokenizer, language: nn.Module | None) -> None:
        super().__init__()
        self.tokenizer, self.language = tokenizer, language
        frozen = () if language is None else tuple(language.parameters())
        self._frozen = {id(weight) for weight in frozen if not weight.requires_grad}
        self._frozen.add(id(tokenizer.encoder.whisper.embed_positions.weight))  # sinusoids, as in Whisper

    def trainable(self, *modules: nn.Module | None) -> tuple[nn.Parameter, ...]:
        """Parameters of `modules` that may move."""
        return tuple(
            weight for module in modules if module is not None for weight in module.parameters()
            if id(weight) not in self._frozen
        )  # fmt: skip

    def answer_loss(self, settings: AudioTraining, features_BTQ: Tensor, batch: AudioBatch) -> dict[str, Tensor]:
        """The weighted language term, or nothing where it is switched off."""
        if self.language is None or settings.language_weight == 0:
            return {}
        answer: Tensor = self.language(features_BTQ, batch.mels.positions, batch.answers)
        return {"language": settings.language_weight * answer}


def stages(trainee: AudioTrainee, source: Source, settings: AudioTraining) -> list[Stage]:
    """The three stages, in order."""
    return [make(trainee, source, settings) for make in (warm_up, joint, flow)]


def warm_up(trainee: AudioTrainee, source: Source, settings: AudioTraining) -> Stage:
    """Encoder, pooling and decoder on continuous features."""
    tokenizer = trainee.tokenizer

    def loss(batch: AudioBatch) -> tuple[Tensor, dict[str, Tensor]]:
        features_BTQ = tokenizer.features(batch.mels)
        terms = {"mel": settings.mel_weight * _mel_loss(tokenizer, features_BTQ, batch)}
        return _sum(terms | trainee.answer_loss(settings, features_BTQ, batch))

    return Stage(
        name="audio_warm_up",
        module=trainee,
        parameters=trainee.trainable(tokenizer.encoder, tokenizer.pool, tokenizer.decoder, trainee.language),
        batch=_batches(tokenizer, source, offset=0),
        loss=loss,
        steps=settings.warm_up_steps,
        learning_rate=settings.learning_rate,
    )


def joint(trainee: AudioTrainee, source: Source, settings: AudioTraining) -> Stage:
    """Everything but the refiner, through the quantizer."""
    tokenizer = trainee.tokenizer

    def loss(batch: AudioBatch) -> tuple[Tensor, dict[str, Tensor]]:
        features_BTQ = tokenizer.features(batch.mels)
        mask_BT = length_mask(batch.mels.positions, features_BTQ.shape[1])
        kept_B = draw_kept(len(mask_BT), len(tokenizer.quantizer.sizes), settings.full_share)
        coded = tokenizer.quantizer(features_BTQ, mask=mask_BT, kept=kept_B.to(mask_BT.device)[:, None])
        terms = {
            "mel": settings.mel_weight * _mel_loss(tokenizer, coded.quantized, batch),
            "commitment": settings.commitment_weight * coded.losses.mean(),
        }
        return _sum(terms | trainee.answer_loss(settings, coded.quantized, batch))

    return Stage(
        name="audio_joint",
        module=trainee,
        parameters=trainee.trainable(tokenizer.encoder, tokenizer.pool, tokenizer.decoder, trainee.language),
        batch=_batches(tokenizer, source, offset=settings.warm_up_steps),
        loss=loss,
        steps=settings.joint_steps,
        learning_rate=settings.learning_rate,
    )


def flow(trainee: AudioTrainee, source: Source, settings: AudioTraining) -> Stage:
    """The refiner alone, on what the frozen tokenizer decodes from all levels."""
    tokenizer = trainee.tokenizer

    def loss(batch: AudioBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mels = batch.mels
        with torch.no_grad():
            features_BTQ = tokenizer.features(mels)
            mask_BT = length_mask(mels.positions, features_BTQ.shape[1])
            codes_BTL = tokenizer.quantizer.encode(features_BTQ, mask=mask_BT).codes
            coarse_BMS = tokenizer.decoder(tokenizer.quantizer.decode(codes_BTL), mels.positions)
        return _sum({"flow": tokenizer.refiner.loss(mels.log_mel, coarse_BMS, tokenizer.frames(mels.positions))})

    return Stage(
        name="audio_flow",
        module=trainee,
        parameters=trainee.trainable(tokenizer.refiner),
        batch=_batches(tokenizer, source, offset=settings.warm_up_steps + settings.joint_steps),
        loss=loss,
        steps=settings.flow_steps,
        learning_rate=settings.learning_rate,
    )


def draw_kept(clips: int, levels: int, full_share: float) -> Tensor:
    """How many levels each clip keeps, int64 [clips]: all of them with probability `full_share`, else 1 to `levels`."""
    return torch.randint(1, levels + 1, (clips,)).masked_fill(torch.rand(clips) < full_share, levels)


def _mel_loss(tokenizer: AudioTokenizer, features_BTQ: Tensor, batch: AudioBatch) -> Tensor:
    coarse_BMS = tokenizer.decoder(features_BTQ, batch.mels.positions)
    return mel_loss(coarse_BMS, batch.mels.log_mel, tokenizer.frames(batch.mels.positions))


def _sum(terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    total = torch.stack(list(terms.values())).sum()
    return total, {name: term.detach() for name, term in terms.items()}


def _batches(tokenizer: AudioTokenizer, source: Source, *, offset: int) -> Callable[[int], AudioBatch]:
    """Batches of a stage; `offset` keeps the stages from hearing the same numbers in the same order."""

    def batch(step: int) -> AudioBatch:
        waveforms, answers = source(step + offset)
        mels = tokenizer.mels(waveforms)
        rows = [torch.tensor(answer, dtype=torch.int64) for answer in answers]
        padded_BA = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return AudioBatch(mels, padded_BA.to(mels.log_mel.device))

    return batch
