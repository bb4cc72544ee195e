"""From log-mel to waveform: the interface, and Griffin-Lim as the default that needs no weights."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from librosa import griffinlim
from librosa.filters import mel
from torch import Tensor

from longcat_model import config
from longcat_model.tokenizers.audio.frontend import mel_power


class Vocoder(Protocol):
    """Anything that turns a log-mel [mels, frames] of `LogMel` into a waveform [frames * hop] float32."""

    def __call__(self, log_mel: Tensor) -> Tensor: ...


class GriffinLim:
    """Least-squares inversion of the mel filters, then phases by fast Griffin-Lim (librosa). Deterministic."""

    def __init__(self, sizes: config.AudioEncoder, iterations: int = 32) -> None:
        self.sizes, self.iterations = sizes, iterations
        filters = mel(sr=sizes.sample_rate, n_fft=sizes.fft, n_mels=sizes.mels)
        self._inverse = np.linalg.pinv(filters)

    def __call__(self, log_mel: Tensor) -> Tensor:
        """Waveform [frames * hop] float32, within [-1, 1]."""
        sizes, frames = self.sizes, log_mel.shape[1]
        power = self._inverse @ mel_power(log_mel.float().cpu()).numpy()
        magnitude = np.sqrt(np.maximum(power, 0))
        waveform = griffinlim(
            np.pad(magnitude, ((0, 0), (0, 1))),
            n_iter=self.iterations,
            hop_length=sizes.hop,
            n_fft=sizes.fft,
            length=frames * sizes.hop,
            random_state=0,
        )
        return torch.from_numpy(waveform).float().clamp(-1, 1)
