"""The joined model: what an embedding is made of, cached decoding with n-grams, isolation, names and counts."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_model import config, presets
from longcat_model.backbone import Cache
from longcat_model.model import LongcatNext
from longcat_model.sequence import Inputs

SIZES = presets.tiny()
PLAIN = dataclasses.replace(SIZES, backbone=dataclasses.replace(SIZES.backbone, ngram=None))
TEXT, CELL, SPEECH, MARKER, PADDING = range(5)


@pytest.fixture(scope="module")
def model() -> LongcatNext:
    torch.manual_seed(0)
    return LongcatNext(SIZES).eval()


def _inputs(kinds: Tensor, documents: Tensor, seed: int) -> Inputs:
    """Random contents of the given kinds [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    shape = kinds.shape

    def draw(sizes: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randint(0, size, shape, generator=generator) for size in sizes], -1)

    text = torch.randint(0, 8, shape, generator=generator)  # few ids, so that 0 and EOS come often
    text[torch.rand(shape, generator=generator) < 0.2] = SIZES.vocabulary.text_size + 37
    marker = torch.full(shape, SIZES.vocabulary.text_size + 48)
    visual, audio = draw(SIZES.vocabulary.visual_sizes), draw(SIZES.vocabulary.audio_sizes)
    return Inputs(
        text.masked_fill((kinds == CELL) | (kinds == PADDING), -1),
        marker.masked_fill(kinds != MARKER, -1),
        visual.masked_fill((kinds != CELL)[..., None], -1),
        audio.masked_fill((kinds != SPEECH)[..., None], -1),
        documents.masked_fill(kinds == PADDING, -1),
    )


def _slice(inputs: Inputs, start: int, end: int) -> Inputs:
    return Inputs(*(getattr(inputs, field.name)[:, start:end] for field in dataclasses.fields(inputs)))


@st.composite
def _packed(draw: st.DrawFn) -> Inputs:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    kinds = torch.tensor([[draw(st.integers(TEXT, MARKER)) for _ in range(length)] for _ in range(batch)])
    cuts = [draw(st.lists(st.integers(1, length), max_size=2)) for _ in range(batch)]
    documents = torch.tensor([[sum(p >= cut for cut in row) for p in range(length)] for row in cuts])
    kinds[:, length - draw(st.integers(0, length // 2)) :] = PADDING
    return _inputs(kinds, documents, draw(st.integers(0, 1000)))


def test_an_embedding_is_the_sum_of_what_a_position_holds(model: LongcatNext) -> None:
    kinds = torch.tensor([[TEXT, CELL, SPEECH, MARKER, PADDING], [CELL, TEXT, TEXT, SPEECH, SPEECH]])
    inputs = _inputs(kinds, torch.zeros_like(kinds), seed=1)
    assert model.ngram is not None
    table = model.embed_tokens.weight
    text = model.ngram(inputs.text, table, inputs.documents, None)
    embeddings = model.embed(inputs)
    for b, s in itertools.product(range(2), range(5)):
        truth = text[b, s]
        if kinds[b, s] == MARKER:
            truth = truth + table[inputs.marker[b, s]]
        if kinds[b, s] == SPEECH:
            truth = truth + sum(rows[code] for rows, code in zip(model.audio_tables(), inputs.audio[b, s], strict=True))
        if kinds[b, s] == CELL:
            assert not text[b, s].any()
            v = torch.stack([r[c] for r, c in zip(model.visual_tables(), inputs.visual[b, s], strict=True)]).sum(0)
            truth = model.pre_buffer(v)
        torch.testing.assert_close(embeddings[b, s], truth)
    assert not embeddings[0, 4].any()


def test_the_pre_buffer_is_a_gated_residual(model: LongcatNext) -> None:
    v = torch.randn(3, SIZES.backbone.hidden, generator=torch.Generator().manual_seed(2))
    bridge = model.pre_buffer
    normed = F.layer_norm(v, v.shape[-1:], bridge.pre_layernorm.weight, bridge.pre_layernorm.bias, 1e-5)
    gate, up, down = (getattr(bridge.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    torch.testing.assert_close(bridge(v), v + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T)


def test_without_ngrams_text_is_its_plain_row() -> None:
    model = LongcatNext(PLAIN)
    kinds = torch.tensor([[TEXT, PADDING, TEXT]])
    inputs = _inputs(kinds, torch.zeros_like(kinds), seed=3)
    embeddings = model.embed(inputs)
    assert torch.equal(embeddings[0, [0, 2]], model.embed_tokens.weight[inputs.text[0, [0, 2]]])
    assert not embeddings[0, 1].any()
    cache = Cache.empty(PLAIN.backbone, 1, 3)
    with torch.no_grad():
        pieces = [model(_slice(inputs, s, s + 1), cache).hidden for s in range(3)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(inputs).hidden, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(inputs=_packed(), data=st.data())
def test_cached_decoding_equals_the_full_forward(model: LongcatNext, inputs: Inputs, data: st.DataObject) -> None:
    batch, length = inputs.text.shape
    points = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=length))})
    cache = Cache.empty(SIZES.backbone, batch, length)
    with torch.no_grad():
        pieces = [model(_slice(inputs, *ends), cache).hidden for ends in itertools.pairwise(points)]
        full = model(inputs).hidden
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_separate_forwards(model: LongcatNext) -> None:
    lengths = [4, 1, 6, 3]
    kinds = torch.tensor([[TEXT, TEXT, SPEECH, SPEECH, TEXT, CELL, CELL, TEXT, MARKER, SPEECH, TEXT, TEXT, TEXT, TEXT]])
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    inputs = _inputs(kinds, documents, seed=4)
    packed = model(inputs).hidden.split(lengths, 1)
    start = 0
    for length, hidden in zip(lengths, packed, strict=True):
        alone = model(_slice(inputs, start, start + length)).hidden
        torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)
        start += length


def test_padding_is_finite_and_touches_nothing(model: LongcatNext) -> None:
    kinds = torch.tensor([[TEXT, CELL, SPEECH, PADDING, PADDING], [PADDING] * 5])
    inputs = _inputs(kinds, torch.zeros_like(kinds), seed=5)
    hidden = model(inputs).hidden
    assert hidden.isfinite().all()
    alone = model(Inputs(*(getattr(inputs, field.name)[:1, :3] for field in dataclasses.fields(inputs)))).hidden
    torch.testing.assert_close(hidden[:1, :3], alone, rtol=1e-5, atol=1e-5)
    loss = hidden.square().sum()
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    model.zero_grad(set_to_none=True)


def test_every_parameter_of_the_trunk_learns(model: LongcatNext) -> None:
    kinds = torch.tensor([[TEXT, CELL, SPEECH, MARKER] * 8])
    output = model(_inputs(kinds, torch.zeros_like(kinds), seed=6))
    model.text_logits(output.hidden).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    model.zero_grad(set_to_none=True)
    assert {name.split(".")[0] for name in silent} == {"visual_head", "audio_head"}


def test_level_tables_are_views_that_share_a_row(model: LongcatNext) -> None:
    tables = [*model.audio_tables(), *model.visual_tables()]
    sizes = [*SIZES.vocabulary.audio_sizes, *SIZES.vocabulary.visual_sizes]
    assert [len(table) for table in tables] == [size + 1 for size in sizes]
    assert tables[0].data_ptr() == model.embed_tokens.weight[model.ids.text_rows].data_ptr()
    for table, successor in itertools.pairwise(tables):
        assert table[-1].data_ptr() == successor[0].data_ptr()
    assert tables[-1][-1].data_ptr() == model.embed_tokens.weight[-1].data_ptr()


def test_text_logits_cover_text_and_special_ids(model: LongcatNext) -> None:
    assert model.text_logits(torch.zeros(2, 3, SIZES.backbone.hidden)).shape == (2, 3, SIZES.vocabulary.text_size + 53)


def test_weights_follow_the_seed() -> None:
    def state() -> dict[str, Tensor]:
        torch.manual_seed(7)
        return LongcatNext(SIZES).state_dict()

    first, second = state(), state()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_refuses_rows_of_another_shape(model: LongcatNext) -> None:
    kinds = torch.tensor([[TEXT, CELL]])
    inputs = _inputs(kinds, torch.zeros_like(kinds), seed=8)
    with pytest.raises(ValueError, match=r"LongcatNext: inputs.visual must be \[1, 2, 3\], got \[1, 2, 2\]"):
        model(dataclasses.replace(inputs, visual=inputs.visual[..., :2]))
    with pytest.raises(ValueError, match=r"LongcatNext: inputs.documents must be \[1, 2\], got \[1, 1\]"):
        model(dataclasses.replace(inputs, documents=inputs.documents[:, :1]))
    with pytest.raises(ValueError, match=r"LongcatNext: inputs.text must be \[B, S\], got \[2\]"):
        model(dataclasses.replace(inputs, text=inputs.text[0]))


def test_refuses_ids_and_codes_of_another_modality(model: LongcatNext) -> None:
    kinds = torch.tensor([[TEXT, CELL, SPEECH]])
    inputs = _inputs(kinds, torch.zeros_like(kinds), seed=9)
    for name, column, value, rule in (
        ("text", 0, 313, "must be below 313, got 313"),
        ("marker", 0, 313, "must be below 313, got 313"),
        ("visual", 1, 8, r"must be in \[0, \[8, 8, 8\]\) by level, got"),
        ("audio", 2, 6, r"must be in \[0, \[8, 6, 4, 4\]\) by level, got"),
    ):
        changed = getattr(inputs, name).clone()
        changed[0, column] = value
        with pytest.raises(ValueError, match=rf"LongcatNext: inputs.{name} {rule}"):
            model(dataclasses.replace(inputs, **{name: changed}))


@pytest.mark.parametrize("preset", [presets.longcat_next, presets.demo, presets.tiny])
def test_every_preset_builds(preset: Callable[[], config.Model]) -> None:
    with torch.device("meta"):
        model = LongcatNext(preset())
    assert model.embed_tokens.num_embeddings == model.ids.rows


RELEASED_COUNTS = {  # parameters of the released checkpoint, by family
    r"ngram\.embedders\.": 31_406_985_216,
    r"mlps\.": 1_585_446_912,
    r"self_attn\.": 915_726_336,
    r"mlp\.(gate_up|down)$": 33_822_867_456,
    r"router\.": 16_515_072,
    r"lm_head\.": 402_816_000,
    r"pre_buffer\.": 75_503_616,
    r"visual_head\.": 879_039_496,
    r"audio_head\.": 1_428_481_032,
}


def test_the_released_shape_has_the_released_parameters() -> None:
    with torch.device("meta"):
        model = LongcatNext(presets.longcat_next())
    for pattern, count in RELEASED_COUNTS.items():
        assert sum(p.numel() for name, p in model.named_parameters() if re.search(pattern, name)) == count, pattern
