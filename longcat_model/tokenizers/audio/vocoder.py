"""From log-mel to waveform: the interface, and Griffin-Lim as the default that needs no weights.

Dimension key
    M mels    F spectrum bins    S mel frames
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from librosa import griffinlim
from librosa.filters import mel
from torch import Tensor

from longcat_model import config
from longcat_model.tokenizers.audio.frontend import mel_power

_SPECTRUM_STEPS = 8  # multiplicative steps; more follow the errors of a predicted mel rather than its shape
_TINY = 1e-12


class Vocoder(Protocol):
    """Anything that turns a log-mel [mels, frames] of `LogMel` into a waveform [frames * hop] float32."""

    def __call__(self, log_mel: Tensor) -> Tensor: ...


class GriffinLim:
    """Spectrum by multiplicative (Richardson-Lucy) steps, phases by fast Griffin-Lim (librosa). Deterministic.

    Least squares would be wrong here: narrow mel filters overlap so much that small errors of a predicted mel come back
    enlarged, with both signs, where a power has only one.
    """

    def __init__(self, sizes: config.AudioEncoder, iterations: int = 32) -> None:
        self.sizes, self.iterations = sizes, iterations
        self._filters_MF = mel(sr=sizes.sample_rate, n_fft=sizes.fft, n_mels=sizes.mels)

    def __call__(self, log_mel: Tensor) -> Tensor:
        """Waveform [frames * hop] float32, within [-1, 1]."""
        sizes, frames = self.sizes, log_mel.shape[1]
        magnitude_FS = np.sqrt(self._spectrum(mel_power(log_mel.float().cpu()).numpy()))
        waveform = griffinlim(
            np.pad(magnitude_FS, ((0, 0), (0, 1))),
            n_iter=self.iterations,
            hop_length=sizes.hop,
            n_fft=sizes.fft,
            length=frames * sizes.hop,
            random_state=0,
        )
        return torch.from_numpy(waveform).float().clamp(-1, 1)

    def _spectrum(self, mel_MS: np.ndarray) -> np.ndarray:
        """A power spectrum [F, S] whose mels come near `mel_MS`; bins that no filter sees are 0."""
        filters_MF = self._filters_MF
        seen_F1 = filters_MF.sum(0)[:, None]
        spectrum_FS = np.full((filters_MF.shape[1], mel_MS.shape[1]), 1.0, dtype=np.float32)
        for _ in range(_SPECTRUM_STEPS):
            ratio_MS = mel_MS / np.maximum(filters_MF @ spectrum_FS, _TINY)
            spectrum_FS *= (filters_MF.T @ ratio_MS) / np.maximum(seen_F1, _TINY)
        return spectrum_FS
