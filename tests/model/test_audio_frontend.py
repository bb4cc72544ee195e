"""The log-mel front end against Whisper's own, and its independence of batch mates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from longcat_model import config
from longcat_model.tokenizers.audio.frontend import LogMel, mel_power


def clip(seconds: float, seed: int = 0) -> torch.Tensor:
    time = torch.arange(int(16_000 * seconds)) / 16_000
    tone = torch.sin(2 * torch.pi * (200 + 300 * time) * time) * torch.sin(torch.pi * time / seconds)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    return (0.3 * tone + 0.01 * noise).float()


@pytest.mark.parametrize("mels", [80, 128])
def test_equals_whisper_feature_extractor(mels: int) -> None:
    waveform = clip(0.8)
    theirs = WhisperFeatureExtractor(feature_size=mels)(waveform.numpy(), sampling_rate=16_000)["input_features"][0]
    ours = LogMel(config.AudioEncoder(mels=mels))(waveform[None], torch.tensor([len(waveform)]))[0]
    np.testing.assert_allclose(ours.numpy(), theirs[:, : ours.shape[1]], atol=1e-4)


def test_a_clip_does_not_feel_its_batch_mates() -> None:
    front_end = LogMel(config.AudioEncoder(mels=40))
    short, long = clip(0.32), clip(0.8, seed=1) * 3
    batch = torch.stack([torch.nn.functional.pad(short, (0, len(long) - len(short))), long])
    together = front_end(batch, torch.tensor([len(short), len(long)]))
    alone = front_end(short[None], torch.tensor([len(short)]))
    torch.testing.assert_close(together[0, :, : alone.shape[2]], alone[0])
    assert not together[0, :, alone.shape[2] :].any()


def test_range_is_the_configured_number_of_decades() -> None:
    log_mel = LogMel(config.AudioEncoder(log_range=5.0))(
        torch.cat([clip(0.4), torch.zeros(3200)])[None], torch.tensor([9600])
    )
    power = mel_power(log_mel).log10()
    assert float(power.max() - power.min()) == pytest.approx(5.0, abs=1e-4)
