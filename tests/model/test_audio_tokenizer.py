"""The audio tokenizer at a tiny size: encoder, pooling, chunks, levels, refiner, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from longcat_model import presets
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.audio.encoder import AudioEncoder, GatedPool, whisper_config
from longcat_model.tokenizers.audio.refiner import MelRefiner
from tests.model.test_audio_frontend import clip

SIZES = presets.tiny().audio
POSITION = 1280  # samples


@pytest.fixture
def tokenizer() -> AudioTokenizer:
    torch.manual_seed(0)
    module = AudioTokenizer(SIZES)
    module.train()
    with torch.no_grad():  # fills the codebooks from features, as training would
        mels = module.mels([clip(1.0, seed) for seed in range(4)])
        for _ in range(3):
            module.quantizer(module.features(mels))
    return module.eval()


def test_encoder_equals_transformers_and_loads_its_state_dict() -> None:
    sizes = replace(SIZES.encoder, max_positions=50)
    torch.manual_seed(1)
    theirs = WhisperEncoder(
        whisper_config(sizes.width, sizes.heads, sizes.mlp_width, depth=sizes.depth, mels=sizes.mels, positions=50)
    ).eval()
    ours = AudioEncoder(sizes).eval()
    ours.whisper.load_state_dict(theirs.state_dict(), strict=True)
    log_mel = torch.randn(2, sizes.mels, 100)
    with torch.no_grad():
        torch.testing.assert_close(ours(log_mel, torch.tensor([100, 100])), theirs(log_mel).last_hidden_state)


def test_padding_does_not_reach_features_or_codes(tokenizer: AudioTokenizer) -> None:
    clips = [clip(0.3, 5), clip(0.9, 6), clip(0.5, 7)]
    together = tokenizer.encode(clips)
    with torch.no_grad():
        batch = tokenizer.features(tokenizer.mels(clips))
        for row, waveform in enumerate(clips):
            alone = tokenizer.features(tokenizer.mels([waveform]))[0]
            torch.testing.assert_close(batch[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(together[row], tokenizer.encode([waveform])[0])


def test_pool_is_swiglu_over_neighbours_plus_residual() -> None:
    torch.manual_seed(0)
    pool = GatedPool(4, 2)
    hidden = torch.randn(1, 7, 4)
    pairs = hidden[:, :6].reshape(1, 3, 8)
    flat = {n: getattr(pool, n).weight.permute(0, 2, 1).reshape(8, 8) for n in ("gate_proj", "up_proj")}
    gated = torch.nn.functional.silu(pairs @ flat["gate_proj"].T) * (pairs @ flat["up_proj"].T)
    torch.testing.assert_close(pool(hidden), pool.layer_norm(pool.down_proj(gated) + pairs))


def test_codes_cover_every_sample_at_twelve_and_a_half_hertz(tokenizer: AudioTokenizer) -> None:
    lengths = [1, POSITION, POSITION + 1, 5 * POSITION]
    codes = tokenizer.encode([clip(1.0)[:n] for n in lengths])
    assert [tuple(c.shape) for c in codes] == [(1, 4), (1, 4), (2, 4), (5, 4)]
    assert all(bool((c >= 0).all() and (c < torch.tensor(SIZES.quantizer.sizes)).all()) for c in codes)
    assert SIZES.frame_hz == 16_000 / POSITION


def test_long_clips_are_cut_into_chunks(tokenizer: AudioTokenizer) -> None:
    chunk = tokenizer.positions_per_chunk * POSITION
    waveform = torch.cat([clip(1.0, seed) for seed in range(4)])
    whole = tokenizer.encode([waveform])[0]
    assert torch.equal(whole, torch.cat(tokenizer.encode(list(waveform.split(chunk)))))
    assert len(tokenizer.decode([whole])[0]) == len(whole) * POSITION


def test_decoding_is_deterministic_and_alone_equals_together(tokenizer: AudioTokenizer) -> None:
    codes = tokenizer.encode([clip(0.3, 5), clip(0.9, 6)])
    first, second = tokenizer.decode_mel(codes, seed=3), tokenizer.decode_mel(codes, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(tokenizer.decode_mel(codes[:1], seed=3)[0], first[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(tokenizer.decode_mel(codes, seed=4)[0], first[0])
    assert [mel.shape[1] for mel in first] == [8 * len(c) for c in codes]
    waveforms = tokenizer.decode(codes, seed=3)
    assert [len(w) for w in waveforms] == [POSITION * len(c) for c in codes]
    assert all(bool(w.isfinite().all()) and float(w.abs().max()) <= 1 for w in waveforms)


def test_first_levels_ignore_the_others(tokenizer: AudioTokenizer) -> None:
    codes = tokenizer.encode([clip(0.9, 6)])[0]
    other = codes.clone()
    other[:, 2:] = 0
    two = [tokenizer.decode_mel([c], levels=2, refine=False)[0] for c in (codes, other)]
    assert torch.equal(*two)
    assert not torch.equal(two[0], tokenizer.decode_mel([codes], refine=False)[0])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"codes must be \[positions > 0, 4\], got \[3, 2\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"codes must be \[positions > 0, 4\], got \[0, 4\]"),
        (torch.tensor([[0, 0, 0, 4]]), "codes must lie in"),
        (torch.tensor([[0, -1, 0, 0]]), "codes must lie in"),
    ],
)
def test_refuses_codes(tokenizer: AudioTokenizer, codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([codes])


def test_refuses_waveforms_levels_and_widths(tokenizer: AudioTokenizer) -> None:
    with pytest.raises(ValueError, match=r"waveforms must be \[samples\]"):
        tokenizer.encode([torch.zeros(2, 100)])
    with pytest.raises(ValueError, match=r"levels must lie in \[1, 4\], got 5"):
        tokenizer.decode([torch.zeros(1, 4, dtype=torch.int64)], levels=5)
    with pytest.raises(ValueError, match=r"clips must last at most 2 s at once, got 2\.08 s \(cut it"):
        tokenizer.features(tokenizer.mels([torch.ones(32_001)]))
    with pytest.raises(ValueError, match=r"quantizer.dim must equal encoder.width \* pool = 128, got 64"):
        AudioTokenizer(replace(SIZES, quantizer=replace(SIZES.quantizer, dim=64)))


def test_refiner_learns_what_the_coarse_mel_lacks() -> None:
    torch.manual_seed(0)
    refiner = MelRefiner(replace(SIZES.refiner, steps=6, guidance=0.0), 4)
    optimizer = torch.optim.Adam(refiner.parameters(), 3e-3)
    frames = torch.tensor([16, 12, 16, 8])
    for _ in range(300):
        coarse = (0.5 + torch.rand(4, 1, 1)).expand(4, 4, 16)  # 0 would read as no condition
        loss = refiner.loss(coarse + 0.4 * (1 - coarse), coarse, frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    coarse = torch.tensor([0.5, 0.7, 1.5]).view(3, 1, 1).expand(3, 4, 16)
    with torch.no_grad():
        refined = refiner.refine(coarse, torch.tensor([16, 16, 8]))
    target = coarse + 0.4 * (1 - coarse)
    valid = torch.arange(16) < torch.tensor([16, 16, 8])[:, None, None]
    after, before = ((mel - target).abs()[valid.expand(3, 4, 16)].mean() for mel in (refined, coarse))
    assert float(after) < float(before) / 2
    assert torch.equal(refined[2, :, 8:], coarse[2, :, 8:])


def test_guidance_and_temperature_act_as_written() -> None:
    torch.manual_seed(0)
    coarse, frames = torch.rand(2, 4, 16), torch.tensor([16, 16])
    refiner = MelRefiner(replace(SIZES.refiner, steps=1, guidance=2.0, temperature=0.5), 4)
    with torch.no_grad():
        noise = 5.0 * (MelRefiner(replace(SIZES.refiner, steps=0), 4).refine(coarse, frames) - coarse) * 0.5
        guided, free = (refiner(noise, c, torch.zeros(2), frames) for c in (coarse, torch.zeros_like(coarse)))
        torch.testing.assert_close(refiner.refine(coarse, frames), coarse + (noise + 3 * guided - 2 * free) / 5)


def test_released_sizes_give_the_released_parameter_counts() -> None:
    sizes = presets.longcat_next().audio
    with torch.device("meta"):
        encoder, pool = AudioEncoder(sizes.encoder), GatedPool(sizes.encoder.width, sizes.pool)
        to_decoder = torch.nn.Linear(sizes.quantizer.dim, sizes.decoder.width)
    bridge = sum(weight.numel() for module in (pool, to_decoder) for weight in module.parameters())
    assert sum(weight.numel() for weight in encoder.parameters()) == 636_968_960
    assert bridge == 85_208_320
