"""The released vocoder: mels at 50 Hz to 24 kHz waveforms, HiFT (HiFi-GAN with a harmonic source and an inverse STFT).

Its weights are in a file of their own, `cosy24k_vocoder/hift.pt`, those of CosyVoice2-0.5B; parameter names are its.
CosyVoice has two sources of harmonics; which one the weights were trained with is not said. This is the one that counts
phases sample by sample.

Dimension key
    M mels    S frames    N samples    K harmonics, the fundamental included    F channels of the spectrum (18)
"""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils.parametrizations import weight_norm

from longcat_model.released.quirks import Quirks, has_quirks
from longcat_model.released.sizes import VocoderSizes

OVERLAP = 1200  # samples of two segments that are cross-faded
SLOPE = 0.1  # of leaky ReLUs, the last one's is torch's default
LIMIT = 0.99  # of a sample
LARGEST = 100.0  # of a magnitude


class Vocoder(nn.Module):
    """A `tokenizers.audio.vocoder.Vocoder` for the released audio tokenizer.

    Args:
        seed: of the harmonics' first phases and the noise, drawn on the CPU for each waveform anew.
    """

    window: Tensor

    def __init__(self, sizes: VocoderSizes, *, seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.seed = sizes, seed
        bins, widths = sizes.fft + 2, [sizes.width >> (i + 1) for i in range(len(sizes.rates))]
        self.f0_predictor = _Pitch(sizes)
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(sizes.harmonics + 1, 1)})
        self.conv_pre = weight_norm(nn.Conv1d(sizes.mels, sizes.width, 7, padding=3))
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, (rate, kernel, width) in enumerate(zip(sizes.rates, sizes.kernels, widths, strict=True)):
            up = nn.ConvTranspose1d(2 * width, width, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            down = prod(sizes.rates[i + 1 :])
            kernel = 2 * down if down > 1 else 1
            self.source_downs.append(nn.Conv1d(bins, width, kernel, down, padding=down // 2 if down > 1 else 0))
            self.source_resblocks.append(_Resblock(width, sizes.source_kernels[i], sizes.dilations))
            self.resblocks.extend(_Resblock(width, k, sizes.dilations) for k in sizes.block_kernels)
        self.conv_post = weight_norm(nn.Conv1d(widths[-1], bins, 7, padding=3))
        self.register_buffer("window", torch.hann_window(sizes.fft), persistent=False)

    @torch.no_grad()
    def forward(self, log_mel: Tensor) -> Tensor:
        """log_mel: [M, S] at 50 Hz; returns a waveform [S * samples] float32 within 0.99."""
        mel_1MS = log_mel[None]
        pitch_S = self.f0_predictor(mel_1MS)[0]
        source_1N = self._source(pitch_S.repeat_interleave(self.sizes.samples))[None]
        fft, hop = self.sizes.fft, self.sizes.hop
        spectrum = torch.stft(source_1N, fft, hop, window=self.window, return_complex=True)
        out_1FS = self._filter(mel_1MS, torch.cat([spectrum.real, spectrum.imag], 1))
        magnitude, phase = out_1FS.chunk(2, 1)
        turned = torch.polar(magnitude.exp().clamp(max=LARGEST), phase.sin())
        return torch.istft(turned, fft, hop, window=self.window)[0].clamp(-LIMIT, LIMIT)

    def _source(self, pitch_N: Tensor) -> Tensor:
        """Harmonics of the pitch where voiced, and noise, as one signal [N]."""
        sizes = self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        numbers_K1 = torch.arange(1, sizes.harmonics + 2, device=pitch_N.device)[:, None]
        turns_KN = ((pitch_N * numbers_K1).double() / sizes.sample_rate).cumsum(1) % 1
        first_K1 = (2 * torch.rand(len(numbers_K1), 1, generator=generator) - 1) * math.pi
        first_K1[0] = 0
        phases_KN = 2 * math.pi * turns_KN.float() + first_K1.to(pitch_N)
        is_voiced_N = pitch_N > sizes.voiced
        noise_KN = torch.randn(phases_KN.shape, generator=generator).to(pitch_N)
        noise_KN = noise_KN * torch.where(is_voiced_N, sizes.noise, sizes.amplitude / 3)
        waves_KN = sizes.amplitude * phases_KN.sin() * is_voiced_N + noise_KN
        merged: Tensor = self.m_source["l_linear"](waves_KN.T)[:, 0].tanh()
        return merged

    def _filter(self, x: Tensor, source: Tensor) -> Tensor:
        """[1, F, frames of the STFT]: log-magnitudes and phases."""
        x, blocks = self.conv_pre(x), len(self.sizes.block_kernels)
        for i, up in enumerate(self.ups):
            x = up(leaky_relu(x, SLOPE))
            if i == len(self.ups) - 1:
                x = pad(x, (1, 0), mode="reflect")
            x = x + self.source_resblocks[i](self.source_downs[i](source))
            group = self.resblocks[i * blocks : (i + 1) * blocks]
            x = torch.stack([block(x) for block in group]).mean(0)
        out: Tensor = self.conv_post(leaky_relu(x))
        return out


def join(first: Tensor, second: Tensor, *, overlap: int = OVERLAP, quirks: Quirks = "released") -> Tensor:
    """Two waveforms [N] whose last and first `overlap` samples are the same stretch of speech, one after the other.

    With the released quirks the cross-fade of that stretch stands between the whole first and the whole second
    waveform, without them in its place.

    Raises:
        ValueError: a waveform is shorter than the overlap.
    """
    if min(len(first), len(second)) < overlap:
        raise ValueError(f"join: waveforms must have at least {overlap} samples, got {len(first)} and {len(second)}")
    weight = torch.linspace(0, 1, overlap, device=first.device)
    tail, head = first[len(first) - overlap :], second[:overlap]
    faded = tail * (1 - weight) + head * weight
    if has_quirks(quirks):
        return torch.cat([first, faded, second])
    return torch.cat([first[: len(first) - overlap], faded, second[overlap:]])


class _Pitch(nn.Module):
    """Fundamental frequency in Hz of each frame."""

    def __init__(self, sizes: VocoderSizes) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for inputs in (sizes.mels, *[sizes.pitch_width] * 4):
            parts += [weight_norm(nn.Conv1d(inputs, sizes.pitch_width, 3, padding=1)), nn.ELU()]
        self.condnet = nn.Sequential(*parts)
        self.classifier = nn.Linear(sizes.pitch_width, 1)

    def forward(self, mel_1MS: Tensor) -> Tensor:
        return self.classifier(self.condnet(mel_1MS).transpose(1, 2))[..., 0].abs()


class _Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, alpha a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


class _Resblock(nn.Module):
    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        same = kernel // 2
        self.convs1 = nn.ModuleList(
            weight_norm(nn.Conv1d(width, width, kernel, dilation=d, padding=d * same)) for d in dilations
        )
        self.convs2 = nn.ModuleList(weight_norm(nn.Conv1d(width, width, kernel, padding=same)) for _ in dilations)
        self.activations1 = nn.ModuleList(_Snake(width) for _ in dilations)
        self.activations2 = nn.ModuleList(_Snake(width) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in parts:
            x = x + conv2(snake2(conv1(snake1(x))))
        return x
