"""Log-mel front end of Whisper: centred Hann STFT, Slaney mels, log10, a floor below the loudest.

Dimension key
    B clips    N samples    F spectrum bins    M mels    S mel frames
"""

from __future__ import annotations

import torch
from librosa.filters import mel
from torch import Tensor, nn

from longcat_model import config


class LogMel(nn.Module):
    """Waveforms to log-mel frames, `hop` samples apart.

    A clip counts as followed by silence: its last frames see zeros where the released front end, which pads every
    clip to 30 s, sees them too. Frames beyond a clip's own length are 0.
    """

    window: Tensor
    filters_MF: Tensor

    def __init__(self, sizes: config.AudioEncoder) -> None:
        super().__init__()
        self.fft, self.hop, self.log_range = sizes.fft, sizes.hop, sizes.log_range
        filters = mel(sr=sizes.sample_rate, n_fft=sizes.fft, n_mels=sizes.mels)
        self.register_buffer("window", torch.hann_window(sizes.fft), persistent=False)
        self.register_buffer("filters_MF", torch.from_numpy(filters), persistent=False)

    def forward(self, waveforms_BN: Tensor, lengths_B: Tensor) -> Tensor:
        """Log-mel [B, mels, N / hop] float32.

        Args:
            waveforms_BN: float32 in [-1, 1], zero beyond each clip's length; N a multiple of hop.
            lengths_B: int64, samples of each clip, multiples of hop.
        """
        left = self.fft // 2
        head = waveforms_BN[:, 1 : left + 1].flip(1)
        padded = torch.nn.functional.pad(torch.cat([head, waveforms_BN], 1), (0, left))
        spectrum = torch.stft(padded, self.fft, self.hop, window=self.window, center=False, return_complex=True)
        mel_BMS = self.filters_MF @ spectrum[..., :-1].abs().square()
        log_BMS = mel_BMS.clamp(min=1e-10).log10()
        valid_BS = torch.arange(log_BMS.shape[2], device=log_BMS.device) < (lengths_B // self.hop)[:, None]
        loudest_B = log_BMS.amax(1).masked_fill(~valid_BS, -10.0).amax(1)
        log_BMS = torch.maximum(log_BMS, (loudest_B - self.log_range)[:, None, None])
        return ((log_BMS + 4) / 4) * valid_BS[:, None]


def mel_power(log_mel: Tensor) -> Tensor:
    """The mel power spectrum a log-mel stands for: the inverse of the front end's last two steps."""
    return torch.pow(10.0, log_mel * 4 - 4)
