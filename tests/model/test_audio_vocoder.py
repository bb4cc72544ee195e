"""Griffin-Lim from log-mels: the mel survives, also when it is only roughly a mel."""

from __future__ import annotations

import torch

from longcat_model import config
from longcat_model.tokenizers.audio.frontend import LogMel
from longcat_model.tokenizers.audio.vocoder import GriffinLim
from tests.model.test_audio_frontend import clip

SIZES = config.AudioEncoder(mels=80)


def mel_of(waveform: torch.Tensor) -> torch.Tensor:
    return LogMel(SIZES)(waveform[None], torch.tensor([len(waveform)]))[0]


def test_waveform_has_the_mel_it_was_made_from() -> None:
    log_mel = mel_of(clip(0.8))
    again = mel_of(GriffinLim(SIZES)(log_mel))
    loud = log_mel > log_mel.max() - 0.5  # two decades
    assert float((again - log_mel)[loud].abs().mean()) < 0.04


def test_errors_of_a_predicted_mel_are_not_enlarged() -> None:
    log_mel = mel_of(clip(0.8))
    error = 0.1 * torch.randn(log_mel.shape, generator=torch.Generator().manual_seed(0))
    again = mel_of(GriffinLim(SIZES)(log_mel + error))
    loud = log_mel > log_mel.max() - 0.5
    assert float((again - log_mel)[loud].abs().mean()) < float(error.abs().mean())


def test_is_deterministic_and_bounded() -> None:
    log_mel = mel_of(clip(0.32)) + 1.0
    one, two = (GriffinLim(SIZES)(log_mel) for _ in range(2))
    assert torch.equal(one, two) and len(one) == 160 * log_mel.shape[1] and float(one.abs().max()) <= 1
