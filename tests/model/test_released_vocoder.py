"""The released vocoder against a plain formula over its weights, and the joint of two segments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_model.released.sizes import VocoderSizes
from longcat_model.released.vocoder import Vocoder, join

SIZES = VocoderSizes(mels=6, width=16, pitch_width=8, harmonics=2)


def small(seed: int = 4) -> Vocoder:
    torch.manual_seed(0)
    vocoder = Vocoder(SIZES, seed=seed)
    nn.init.constant_(vocoder.f0_predictor.classifier.bias, 150.0)  # a voice
    for name, parameter in vocoder.named_parameters():
        if name.endswith("alpha"):
            nn.init.uniform_(parameter, 0.5, 2.0)
    return vocoder


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    return x + (alpha[:, None] * x).sin() ** 2 / alpha[:, None]


def block(x: Tensor, module: nn.Module) -> Tensor:
    for i, dilation in enumerate(SIZES.dilations):
        first, second = module.get_submodule(f"convs1.{i}"), module.get_submodule(f"convs2.{i}")
        same = first.weight.shape[2] // 2
        inner = snake(x, module.get_parameter(f"activations1.{i}.alpha"))
        inner = F.conv1d(inner, first.weight, first.bias, padding=dilation * same, dilation=dilation)
        inner = snake(inner, module.get_parameter(f"activations2.{i}.alpha"))
        x = x + F.conv1d(inner, second.weight, second.bias, padding=same)
    return x


def harmonics(pitch_N: Tensor, linear: nn.Linear, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = (torch.rand(3, 1, generator=generator) * 2 - 1) * math.pi
    noise = torch.randn(3, len(pitch_N), generator=generator)
    waves, phase = torch.zeros(3, len(pitch_N)), [0.0, float(first[1]), float(first[2])]
    for n, pitch in enumerate(pitch_N.tolist()):
        for k in range(3):
            phase[k] += 2 * math.pi * pitch * (k + 1) / 24_000
            waves[k, n] = (0.1 * math.sin(phase[k]) if pitch > 10 else 0) + noise[k, n] * (
                0.003 if pitch > 10 else 0.1 / 3
            )
    return (linear.weight[0] @ waves + linear.bias).tanh()


def spectrum(x_N: Tensor) -> Tensor:
    """Real, then imaginary parts of frames of 16 samples, 4 apart, centred, reflected at the ends."""
    padded = F.pad(x_N[None, None], (8, 8), mode="reflect")[0, 0]
    window = torch.tensor([math.sin(math.pi * n / 16) ** 2 for n in range(16)])
    bins = torch.fft.rfft(padded.unfold(0, 16, 4) * window, dim=1).T
    return torch.cat([bins.real, bins.imag])[None]


def waveform(magnitude_FS: Tensor, phase_FS: Tensor) -> Tensor:
    """Overlap-add of the frames, over the windows' power."""
    window = torch.tensor([math.sin(math.pi * n / 16) ** 2 for n in range(16)])
    frames = torch.fft.irfft((magnitude_FS * torch.exp(1j * phase_FS)).T, n=16, dim=1)
    out, power = torch.zeros(4 * len(frames) + 12), torch.zeros(4 * len(frames) + 12)
    for i, frame in enumerate(frames):
        out[4 * i : 4 * i + 16] += frame * window
        power[4 * i : 4 * i + 16] += window**2
    return (out[8:-8] / power[8:-8]).clamp(-0.99, 0.99)


@torch.no_grad()
def test_it_follows_its_formula() -> None:
    vocoder, mel = small(), torch.randn(6, 3)
    pitch = mel[None]
    for conv in list(vocoder.f0_predictor.condnet)[::2]:
        pitch = F.elu(F.conv1d(pitch, conv.weight, conv.bias, padding=1))
    classifier = vocoder.f0_predictor.classifier
    pitch_S = F.linear(pitch[0].T, classifier.weight, classifier.bias)[:, 0].abs()
    assert bool((pitch_S > 10).all())
    source = harmonics(pitch_S.repeat_interleave(480), vocoder.m_source["l_linear"], 4)  # type: ignore[arg-type]
    source_1FS = spectrum(source)
    x = F.conv1d(mel[None], vocoder.conv_pre.weight, vocoder.conv_pre.bias, padding=3)
    for i, (rate, kernel, down) in enumerate(zip((8, 5, 3), (16, 11, 7), (15, 3, 1), strict=True)):
        up, fed = vocoder.ups[i], vocoder.source_downs[i]
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), up.weight, up.bias, rate, padding=(kernel - rate) // 2)
        if i == 2:
            x = torch.cat([x[..., 1:2], x], 2)
        x = x + block(F.conv1d(source_1FS, fed.weight, fed.bias, down, padding=down // 2), vocoder.source_resblocks[i])
        x = sum(block(x, vocoder.resblocks[3 * i + j]) for j in range(3)) / 3
    x = F.conv1d(F.leaky_relu(x, 0.01), vocoder.conv_post.weight, vocoder.conv_post.bias, padding=3)[0]
    expected = waveform(x[:9].exp().clamp(max=100), x[9:].sin())
    got = vocoder(mel)
    assert got.shape == (3 * 480,) == expected.shape
    assert got.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_without_a_voice_the_source_is_noise() -> None:
    vocoder = small()
    linear = vocoder.m_source["l_linear"]
    pitch = torch.cat([torch.zeros(50), torch.full((50,), 200.0)])
    torch.testing.assert_close(vocoder._source(pitch), harmonics(pitch, linear, 4), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_a_waveform_follows_from_the_mel_and_the_seed() -> None:
    mel = torch.randn(6, 3)
    assert torch.equal(small()(mel), small()(mel))
    assert not torch.equal(small()(mel), small(seed=5)(mel))


def test_segments_are_joined_with_the_overlap_inserted_or_replaced() -> None:
    first, second = torch.arange(5.0), torch.tensor([13.0, 14, 15, 16])
    faded = torch.tensor([3.0, 14.0])  # all of the tail at first, all of the head at last
    assert torch.equal(join(first, second, overlap=2), torch.cat([first, faded, second]))
    assert torch.equal(join(first, second, overlap=2, quirks="none"), torch.cat([first[:3], faded, second[2:]]))
    with pytest.raises(ValueError, match="at least 6 samples, got 5 and 4"):
        join(first, second, overlap=6)


def test_the_released_size() -> None:
    """Four bytes a parameter make the released file but for 79 KB, which 328 tensors' entries in it explain."""
    with torch.device("meta"):
        vocoder = Vocoder(VocoderSizes())
    size = 4 * sum(p.numel() for p in vocoder.parameters())
    assert len(vocoder.state_dict()) == 328
    assert 0 < 83_364_158 - size < 328 * 300
    assert VocoderSizes().samples == 480
