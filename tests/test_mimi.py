"""Mimi's quantizer by `rvq_encode` and `rvq_decode`: the codes that moshi and transformers find themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiSplitResidualVectorQuantizer

from longcat_kernels.integrations import mimi

LEVELS, WIDTH, CHANNELS, ENTRIES = 6, 12, 20, 64


def fill(codebook: Any, usage: str, total: str) -> None:
    """Random codewords, each used otherwise."""
    getattr(codebook, usage).copy_(torch.rand(ENTRIES) + 0.5)
    getattr(codebook, total).copy_(torch.randn(ENTRIES, WIDTH))


def moshi_quantizer(**changes: Any) -> Any:
    vq = pytest.importorskip("moshi.quantization.vq", reason="moshi: pip install --no-deps moshi sentencepiece")
    torch.manual_seed(0)
    sizes = {"dimension": WIDTH, "input_dimension": CHANNELS, "output_dimension": CHANNELS, "bins": ENTRIES}
    quantizer = vq.SplitResidualVectorQuantizer(n_q=LEVELS, n_q_semantic=2, **sizes | changes).eval()
    for part in (quantizer.rvq_first, quantizer.rvq_rest):
        for layer in part.vq.layers:
            fill(layer._codebook, "cluster_usage", "embedding_sum")
    return quantizer


def config(**more: Any) -> MimiConfig:
    sizes = {"codebook_size": ENTRIES, "codebook_dim": WIDTH, "vector_quantization_hidden_dimension": WIDTH}
    return MimiConfig(hidden_size=CHANNELS, num_quantizers=LEVELS, num_semantic_quantizers=2, **sizes, **more)


def fill_all(quantizer: Any) -> Any:
    for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        for layer in part.layers:
            fill(layer.codebook, "cluster_usage", "embed_sum")
    return quantizer


def transformers_quantizer() -> Any:
    torch.manual_seed(0)
    return fill_all(MimiSplitResidualVectorQuantizer(config()).eval())


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (moshi_quantizer, torch.float32),  # takes no bfloat16: torch.cdist has none
        (transformers_quantizer, torch.float32),
        (transformers_quantizer, torch.bfloat16),
    ],
)
def test_codes_and_sums_are_those_of_the_original(make: Any, dtype: torch.dtype) -> None:
    quantizer, x = make().to(dtype), torch.randn(3, CHANNELS, 50, dtype=dtype)
    want = quantizer.encode(x)
    by_level = (1, 0, 2) if make is transformers_quantizer else (0, 1, 2)  # to [B, L, T]
    sums = quantizer.decode(want.permute(by_level))
    mimi.patch(quantizer)
    got = quantizer.encode(x)
    assert got.dtype == torch.int64 and torch.equal(got, want) and len(want.unique()) > 50
    decoded = quantizer.decode(got.permute(by_level))
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, sums, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.1)
    mimi.unpatch(quantizer)
    assert not [name for part in quantizer.children() for name in ("encode", "decode") if name in vars(part)]


def test_the_number_of_levels_is_the_callers() -> None:
    theirs, x = moshi_quantizer(), torch.randn(2, CHANNELS, 7)
    for levels in (2, 3, LEVELS):
        theirs.set_num_codebooks(levels)
        want = theirs.encode(x)
        mimi.patch(theirs)
        assert theirs.encode(x).shape == (2, levels, 7) and torch.equal(theirs.encode(x), want)
        assert theirs.encode(x[..., :0]).shape == (2, levels, 0)
        assert theirs.decode(want).shape == x.shape
        mimi.unpatch(theirs)
    other = transformers_quantizer()
    want = other.encode(x, num_quantizers=4)
    mimi.patch(other)
    assert torch.equal(other.encode(x, num_quantizers=4), want) and len(want) == 4


def test_codebooks_that_move_are_followed() -> None:
    quantizer, x = moshi_quantizer(), torch.randn(2, CHANNELS, 60)
    mimi.patch(quantizer)
    before = quantizer.encode(x)
    for part in (quantizer.rvq_first, quantizer.rvq_rest):
        for layer in part.vq.layers:
            layer._codebook._initialized.fill_(1)
    quantizer.train()
    quantizer(x, frame_rate=12)
    quantizer.eval()
    after = quantizer.encode(x)
    mimi.unpatch(quantizer)
    assert torch.equal(after, quantizer.encode(x)) and not torch.equal(after, before)


@pytest.mark.parametrize("make", [moshi_quantizer, transformers_quantizer])
def test_a_copy_of_a_patched_quantizer_has_its_own_codebooks(make: Any) -> None:
    quantizer, x = make(), torch.randn(1, CHANNELS, 40)
    mimi.patch(quantizer)
    before = quantizer.encode(x)
    copied = copy.deepcopy(quantizer)
    for buffer in (b for name, b in copied.named_buffers() if name.endswith(("embedding_sum", "embed_sum"))):
        buffer.neg_()
    for layer in copied.modules():  # both keep what they have divided
        for name in ("_embed", "_embedding"):
            if isinstance(getattr(layer, name, None), Tensor):
                setattr(layer, name, None)
    got = copied.encode(x)
    mimi.unpatch(copied)
    assert torch.equal(got, copied.encode(x)) and not torch.equal(got, before)
    assert torch.equal(quantizer.encode(x), before)


def test_codes_of_any_integers_are_decoded() -> None:
    quantizer = transformers_quantizer()
    codes = torch.randint(ENTRIES, (2, LEVELS, 5), dtype=torch.int32)
    want = quantizer.decode(codes)
    mimi.patch(quantizer)
    torch.testing.assert_close(quantizer.decode(codes), want, rtol=0, atol=1e-6)


def test_a_plain_quantizer_without_projections() -> None:
    vq = pytest.importorskip("moshi.quantization.vq", reason="moshi: pip install --no-deps moshi sentencepiece")
    quantizer = vq.ResidualVectorQuantizer(dimension=WIDTH, n_q=3, bins=ENTRIES).eval()
    for layer in quantizer.vq.layers:
        fill(layer._codebook, "cluster_usage", "embedding_sum")
    x = torch.randn(2, WIDTH, 30)
    want = quantizer.encode(x)
    mimi.patch(quantizer)
    assert torch.equal(quantizer.encode(x), want)


def test_decoding_has_the_gradients_of_the_projections() -> None:
    quantizer = moshi_quantizer()
    codes = torch.randint(ENTRIES, (2, LEVELS, 9))

    def gradients() -> list[Tensor]:
        weights = [quantizer.rvq_first.output_proj.weight, quantizer.rvq_rest.output_proj.weight]
        return list(torch.autograd.grad(quantizer.decode(codes).square().sum(), weights))

    want = gradients()
    mimi.patch(quantizer)
    torch.testing.assert_close(gradients(), want)


def codec() -> MimiModel:
    torch.manual_seed(0)
    small = {"num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    widths = {"head_dim": 10, "intermediate_size": 24, "upsample_groups": CHANNELS, "sliding_window": 8}
    model = MimiModel(config(**small, **widths)).eval()
    fill_all(model.quantizer)
    return model


def test_a_whole_codec_gives_the_same_codes_and_sound() -> None:
    model = codec()
    sound = torch.randn(1, 1, 24_000) * 0.3
    with torch.no_grad():
        want = model.encode(sound).audio_codes
        heard = model.decode(want).audio_values
        mimi.patch(model)
        got = model.encode(sound).audio_codes
        again = model.decode(got).audio_values
    assert got.shape[1] == LEVELS and torch.equal(got, want)
    torch.testing.assert_close(again, heard, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="mimi: model must be a MimiModel or its quantizer, got Linear"):
        mimi.patch(torch.nn.Linear(2, 2))
    quantizer = moshi_quantizer()
    quantizer.rvq_rest.vq.layers[1].project_in = torch.nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="mimi: levels must have no projections of their own"):
        mimi.patch(quantizer)
    assert "encode" not in vars(quantizer.rvq_first)
