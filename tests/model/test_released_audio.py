"""The released audio decoder and flow against plain formulas over their weights, and each quirk by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_model import presets
from longcat_model.released import flow
from longcat_model.released.audio_decoder import CodecDecoder, Prenet, causal
from longcat_model.released.flow import Estimator, chunk_mask, sample
from longcat_model.released.sizes import shrunk

FLOW, DECODER = replace(shrunk().flow, decoder_positions=60), shrunk().model.audio.decoder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def upsampled(x_LD: Tensor, weight: Tensor, bias: Tensor, frames: int) -> Tensor:
    """Position i reaches frames 4 i to 4 i + 2; a frame that nothing reaches holds the bias."""
    out = bias.repeat(frames, 1)
    for i, x in enumerate(x_LD):
        for k in range(3):
            out[4 * i + k] += x @ weight[:, :, k]
    return out


def whisper_layer(x_SD: Tensor, layer: nn.Module, heads: int, norm: object) -> Tensor:
    """Pre-norm causal attention and GELU network, head by head."""
    state, size = layer.state_dict(), len(x_SD)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    normed = norm(x_SD, state, "self_attn_layer_norm")  # type: ignore[operator]
    q, k, v = (linear(normed, f"self_attn.{p}_proj").chunk(heads, 1) for p in "qkv")
    outputs = []
    for q_SC, k_SC, v_SC in zip(q, k, v, strict=True):
        scores = (q_SC @ k_SC.T / math.sqrt(q_SC.shape[1])).masked_fill(torch.ones(size, size).triu(1).bool(), -1e30)
        outputs.append(scores.softmax(1) @ v_SC)
    x_SD = x_SD + linear(torch.cat(outputs, 1), "self_attn.out_proj")
    return x_SD + linear(F.gelu(linear(norm(x_SD, state, "final_layer_norm"), "fc1")), "fc2")  # type: ignore[operator]


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def rms_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}.weight"]


@pytest.mark.parametrize(("quirks", "frames"), [("released", 4 * 5 - 1), ("none", 4 * 5)])
def test_the_decoder_follows_its_formula(quirks: str, frames: int) -> None:
    decoder = CodecDecoder(DECODER, FLOW, quirks=quirks)  # type: ignore[arg-type]
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    x_LD, conv, norm = torch.randn(5, 32), decoder.dconv1.conv, decoder.dconv1.norm
    hidden = upsampled(x_LD, conv.weight, conv.bias, frames)
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    hidden = hidden * norm.weight + norm.bias + decoder.positional_embedding[:frames]
    for layer in decoder.layers:
        hidden = whisper_layer(hidden, layer, DECODER.heads, layer_norm)
    got = decoder(x_LD)
    assert got.shape == (frames, 32)
    torch.testing.assert_close(got, layer_norm(hidden, decoder.state_dict(), "layer_norm"), rtol=1e-4, atol=1e-5)


def test_every_fourth_frame_holds_the_bias_alone() -> None:
    decoder = CodecDecoder(DECODER, FLOW)
    decoder.dconv1.norm, decoder.layers, decoder.layer_norm = nn.Identity(), nn.ModuleList(), nn.Identity()
    decoder.positional_embedding.zero_()
    out = decoder(torch.randn(4, 32))
    torch.testing.assert_close(out[3::4], decoder.dconv1.conv.bias.expand(3, -1))
    assert (out[2::4] - decoder.dconv1.conv.bias).abs().amin(1).max() > 0


def test_the_table_of_positions_bounds_a_segment() -> None:
    decoder = CodecDecoder(DECODER, replace(FLOW, decoder_positions=19))
    assert len(decoder(torch.randn(5, 32))) == 19
    with pytest.raises(ValueError, match="quantized must have at most 5 positions, got 6"):
        decoder(torch.randn(6, 32))
    with pytest.raises(ValueError, match="quirks must be 'released' or 'none', got 'some'"):
        CodecDecoder(DECODER, FLOW, quirks="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("quirks", ["released", "none"])
def test_the_prenet_follows_its_formula(quirks: str) -> None:
    """With the quirk its table of positions is not read."""
    prenet = Prenet(32, FLOW, quirks=quirks)  # type: ignore[arg-type]
    table = prenet.transformer.positional_embedding.normal_()
    x_SD, state = torch.randn(7, 32), prenet.state_dict()
    hidden = F.linear(x_SD, state["in_mlp.0.weight"], state["in_mlp.0.bias"])
    hidden = F.linear(hidden * hidden.sigmoid(), state["in_mlp.2.weight"], state["in_mlp.2.bias"])
    hidden = hidden + table[:7] * (quirks == "none")
    for layer in prenet.transformer.layers:
        hidden = whisper_layer(hidden, layer, FLOW.prenet_heads, rms_norm)
    expected = rms_norm(hidden, state, "transformer.layer_norm") @ state["out_proj.weight"].T
    torch.testing.assert_close(prenet(x_SD), expected, rtol=1e-4, atol=1e-5)


def test_causal_layers_do_not_look_ahead() -> None:
    layers = CodecDecoder(DECODER, FLOW).layers
    x = torch.randn(9, 32)
    later = torch.cat([x[:5], torch.randn(4, 32)])
    assert torch.equal(causal(layers, x)[:5], causal(layers, later)[:5])
    assert not torch.equal(causal(layers, x)[5:], causal(layers, later)[5:])


class Formula:
    """The estimator from its weights by name, for one clip [M, S]."""

    def __init__(self, state: dict[str, Tensor], heads: int) -> None:
        self.state, self.heads = state, heads

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"].squeeze(-1), self.state.get(f"{name}.bias"))

    def convolve(self, x_SW: Tensor, name: str) -> Tensor:
        weight, before = self.state[f"{name}.weight"], torch.cat([torch.zeros(2, x_SW.shape[1]), x_SW])
        return sum(before[k : k + len(x_SW)] @ weight[:, :, k].T for k in range(3)) + self.state[f"{name}.bias"]

    def causal(self, x_SW: Tensor, name: str) -> Tensor:
        normed = layer_norm(self.convolve(x_SW, f"{name}.0"), self.state, f"{name}.2")
        return normed * F.softplus(normed).tanh()

    def transformer(self, x_SW: Tensor, name: str) -> Tensor:
        normed = layer_norm(x_SW, self.state, f"{name}.norm1")
        q, k, v = (self.linear(normed, f"{name}.attn1.to_{p}").chunk(self.heads, 1) for p in "qkv")
        chunk = torch.arange(len(x_SW)) // flow.CHUNK
        outputs = []
        for q_SC, k_SC, v_SC in zip(q, k, v, strict=True):
            scores = (q_SC @ k_SC.T / math.sqrt(q_SC.shape[1])).masked_fill(chunk[:, None] < chunk, -1e30)
            outputs.append(scores.softmax(1) @ v_SC)
        x_SW = x_SW + self.linear(torch.cat(outputs, 1), f"{name}.attn1.to_out.0")
        widened = F.gelu(self.linear(layer_norm(x_SW, self.state, f"{name}.norm3"), f"{name}.ff.net.0.proj"))
        return x_SW + self.linear(widened, f"{name}.ff.net.2")

    def group(self, x_SW: Tensor, time: Tensor, name: str) -> Tensor:
        shift = self.linear(time * F.softplus(time).tanh(), f"{name}.0.mlp.1")
        hidden = self.causal(self.causal(x_SW, f"{name}.0.block1.block") + shift, f"{name}.0.block2.block")
        hidden = hidden + self.linear(x_SW, f"{name}.0.res_conv")
        for i in range(FLOW.blocks):
            hidden = self.transformer(hidden, f"{name}.1.{i}")
        return hidden

    def __call__(self, x: Tensor, condition: Tensor, t: float) -> Tensor:
        half = FLOW.mels
        angles = torch.tensor([1000 * t * 10_000 ** (-i / (half - 1)) for i in range(half)])
        time = self.linear(torch.cat([angles.sin(), angles.cos()]), "time_mlp.linear_1")
        time = self.linear(F.silu(time), "time_mlp.linear_2")
        down = self.group(torch.cat([x, condition]).T, time, "down_blocks.0")
        hidden = self.convolve(down, "down_blocks.0.2")
        for i in range(FLOW.mid_blocks):
            hidden = self.group(hidden, time, f"mid_blocks.{i}")
        hidden = self.group(torch.cat([hidden, down], 1), time, "up_blocks.0")
        hidden = self.causal(self.convolve(hidden, "up_blocks.0.2"), "final_block.block")
        return self.linear(hidden, "final_proj").T


def test_the_estimator_follows_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "CHUNK", 4)
    estimator = Estimator(FLOW)
    x, condition, time = torch.randn(2, FLOW.mels, 11), torch.randn(2, FLOW.mels, 11), torch.tensor([0.0, 0.3])
    formula = Formula(estimator.state_dict(), FLOW.heads)
    expected = torch.stack([formula(*row) for row in zip(x, condition, time.tolist(), strict=True)])
    torch.testing.assert_close(estimator(x, condition, time), expected, rtol=1e-4, atol=1e-5)


def test_a_chunk_sees_itself_and_what_came_before() -> None:
    mask = chunk_mask(250)
    assert mask[0].sum() == 100 and mask[99].sum() == 100 and mask[100].sum() == 200 and mask[249].sum() == 250
    assert not mask[199, 200] and mask[100, 199] and mask[200, 0]


class Constant(nn.Module):
    """Velocity 2 with a condition and 1 without; keeps the times it was asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        self.times.append(float(time[0]))
        return torch.ones_like(x) + (condition.abs().amax((1, 2), keepdim=True) > 0)


def test_sampling_steps_on_the_cosine_schedule_with_guidance() -> None:
    estimator, condition = Constant(), torch.randn(9, 6)
    noise = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(3))[0].T
    torch.testing.assert_close(sample(estimator, condition, seed=3), noise + 1.7 * 2 - 0.7 * 1)
    expected = [1 - math.cos(math.pi / 2 * i / 10) for i in range(10)]
    assert estimator.times == pytest.approx(expected, abs=1e-7)


def test_released_sizes_have_the_released_settings() -> None:
    sizes = presets.longcat_next().audio
    assert (sizes.refiner.steps, sizes.refiner.guidance) == (flow.STEPS, flow.GUIDANCE)
