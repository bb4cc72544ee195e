"""The released checkpoint's table of tensors closes exactly, part by part, and its config survives JSON."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch

from longcat_model import presets
from longcat_model.released.sizes import Sizes, from_json, to_json
from longcat_model.released.tensors import Entry, entries
from longcat_model.tokenizers.vision import VisionTokenizer


@pytest.fixture(scope="module")
def table() -> dict[str, Entry]:
    return entries(Sizes(model=presets.longcat_next()))


def parameters(table: dict[str, Entry], prefix: str = "") -> tuple[int, int]:
    """Tensors and parameters whose names start so."""
    shapes = [entry.shape for name, entry in table.items() if name.startswith(prefix)]
    return len(shapes), sum(map(prod, shapes))


def test_the_released_totals(table: dict[str, Entry]) -> None:
    assert parameters(table) == (13_450, 74_257_230_752)
    float32 = {name: entry for name, entry in table.items() if entry.dtype is torch.float32}
    assert parameters(float32)[1] == 1_155_453_184
    assert {entry.dtype for entry in table.values()} == {torch.float32, torch.bfloat16}
    assert sum(entry.bytes for entry in table.values()) == 150_825_367_872


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("model.visual_tokenizer.", (425, None)),
        ("model.audio_tokenizer.", (1740, None)),
        ("visual_head.", (71, 879_039_496)),
        ("audio_head.", (71, 1_428_481_032)),
        ("model.ngram_embeddings.embedders.", (12, 31_406_985_216)),
        ("model.embed_tokens.", (1, 868_220_928)),
        ("lm_head.", (1, 402_816_000)),
        ("model.visual_tokenizer.visual_model.", (385, 631_975_680)),
        ("model.visual_tokenizer.visual_bridge_model.bridge.", (5, 44_574_464)),
        ("model.visual_tokenizer.visual_bridge_model.quantizer.quant_conv.", (6, 25_704_448)),
        ("model.visual_tokenizer.visual_bridge_model.quantizer.quantize.", (24, 939_683_840)),
        ("model.visual_tokenizer.visual_embedding_layer.", (5, 75_503_616)),
        ("model.audio_tokenizer.audio_model.", (487, 636_968_960)),
        ("model.audio_tokenizer.audio_bridge_model.vq_list.", (24, 199_248_896)),
        ("model.audio_tokenizer.audio_decoder.", (149, 167_587_392)),
        ("model.audio_tokenizer.audio_flow_matching_decoder.prenet.", (163, 44_084_224)),
        ("model.audio_tokenizer.audio_flow_matching_decoder.conditional_decoder.", (910, 70_974_800)),
    ],
)
def test_the_released_parts(table: dict[str, Entry], prefix: str, expected: tuple[int, int | None]) -> None:
    count, size = parameters(table, prefix)
    assert count == expected[0]
    assert expected[1] is None or size == expected[1]


def test_the_vision_encoder_of_this_project_has_the_released_shapes(table: dict[str, Entry]) -> None:
    with torch.device("meta"):
        own = VisionTokenizer(presets.longcat_next().vision).encoder.state_dict()
    names = [name for name in own if name.startswith("visual_model.") and ".merger." not in name]
    assert len(names) == 385
    for name in names:
        assert table[f"model.visual_tokenizer.{name}"].shape == tuple(own[name].shape)


def test_the_config_round_trips() -> None:
    sizes = Sizes(model=presets.longcat_next())
    assert from_json(json.loads(json.dumps(to_json(sizes)))) == sizes
    assert from_json({"model_type": "longcat_next"}) == sizes  # an absent key has its released value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'longcat_next', got 'llama'"),
        ({"hidden_size": "wide"}, r"config\.json's hidden_size must be an integer in \[0, 2\^31\), got 'wide'"),
        ({"vocab_size": 131_125}, "vocab_size must be at least 281654, got 131125"),
    ],
)
def test_refuses_another_config(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(to_json(Sizes(model=presets.longcat_next())) | change)
