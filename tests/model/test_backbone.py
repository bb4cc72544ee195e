"""The backbone against transformers' LongcatFlash, against itself through the cache, and with packed documents."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from longcat_model import config, presets
from longcat_model.backbone import Backbone, BackboneOutput, Cache

SIZES = dataclasses.replace(presets.tiny().backbone, ngram=None)
# Latent wider than a head and the reverse: either way of reading the cache is cheaper in one of them.
WIDE_LATENT = dataclasses.replace(SIZES, attention=dataclasses.replace(SIZES.attention, kv_rank=64))


def _transformers_model(sizes: config.Backbone, rows: int) -> LongcatFlashForCausalLM:
    attention, experts = sizes.attention, sizes.experts
    return LongcatFlashForCausalLM(
        LongcatFlashConfig(
            vocab_size=rows,
            hidden_size=sizes.hidden,
            num_layers=sizes.layers,
            num_attention_heads=attention.heads,
            rms_norm_eps=sizes.norm_eps,
            ffn_hidden_size=sizes.ffn_width,
            q_lora_rank=attention.q_rank,
            kv_lora_rank=attention.kv_rank,
            qk_nope_head_dim=attention.nope_dim,
            qk_rope_head_dim=attention.rope_dim,
            head_dim=attention.rope_dim,  # transformers sizes its rotary table by this one
            v_head_dim=attention.value_dim,
            moe_topk=experts.top_k,
            n_routed_experts=experts.real,
            zero_expert_num=experts.zero,
            expert_ffn_hidden_size=experts.width,
            routed_scaling_factor=experts.scale,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
            attn_implementation="eager",
        )
    ).eval()


def _ours(name: str) -> str:
    """Our name of a transformers parameter: experts are stacked in both, one level higher in ours."""
    stacked = {"mlp.experts.gate_up_proj": "mlp.gate_up", "mlp.experts.down_proj": "mlp.down"}
    name = name.removeprefix("model.")
    for theirs, ours in stacked.items():
        name = name.replace(theirs, ours)
    return name


def _load(backbone: Backbone, theirs: LongcatFlashForCausalLM, real: int) -> None:
    """transformers allocates gate and up rows of identity experts too, and never reads them."""
    state = {
        _ours(name): tensor[:real] if "experts.gate_up" in name else tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith("model.layers") or name == "model.norm.weight"
    }
    backbone.load_state_dict(state)


@pytest.fixture(scope="module")
def pair() -> tuple[Backbone, LongcatFlashForCausalLM]:
    torch.manual_seed(0)
    theirs = _transformers_model(SIZES, rows=50)
    for name, tensor in theirs.state_dict().items():  # nothing may hide behind ones and zeros
        scale = 0.02 if "correction_bias" in name else 0.3
        tensor.copy_(torch.randn(tensor.shape) * scale + (1.0 if "norm" in name else 0.0))
    backbone = Backbone(SIZES)
    _load(backbone, theirs, SIZES.experts.real)
    return backbone, theirs


def test_equals_transformers(pair: tuple[Backbone, LongcatFlashForCausalLM]) -> None:
    backbone, theirs = pair
    embeddings = torch.randn(3, 11, SIZES.hidden, generator=torch.Generator().manual_seed(1))
    truth = theirs.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    torch.testing.assert_close(backbone(embeddings).hidden, truth, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers(pair: tuple[Backbone, LongcatFlashForCausalLM]) -> None:
    backbone, theirs = pair
    generator = torch.Generator().manual_seed(2)
    embeddings, weights = torch.randn(2, 2, 9, SIZES.hidden, generator=generator)
    inputs = [embeddings.clone().requires_grad_() for _ in range(2)]
    (backbone(inputs[0]).hidden * weights).sum().backward()
    (theirs.model(inputs_embeds=inputs[1], use_cache=False).last_hidden_state * weights).sum().backward()
    _assert_close_to_scale(inputs[0].grad, inputs[1].grad)
    gradients = {_ours(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in backbone.named_parameters():
        truth = gradients[name]
        assert truth is not None and truth.abs().max() > 0, name
        _assert_close_to_scale(parameter.grad, truth[: parameter.shape[0]])


def _assert_close_to_scale(value: Tensor | None, truth: Tensor | None) -> None:
    """Within 1e-5 of the tensor's largest element: gradients here are sums of hundreds of terms."""
    assert value is not None and truth is not None
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def _documents(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Rows of consecutive documents with padding at the end, as packing makes them."""
    rows = []
    for _ in range(batch):
        cuts = draw(st.lists(st.integers(0, length), max_size=3))
        row = torch.tensor([sum(position >= cut for cut in cuts) for position in range(length)])
        row[length - draw(st.integers(0, 2)) :] = -1
        rows.append(row)
    return torch.stack(rows)


@st.composite
def _splits(draw: st.DrawFn) -> tuple[Tensor | None, int, int, list[int]]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    points = draw(st.lists(st.integers(1, length), max_size=length))
    documents = _documents(draw, batch, length) if draw(st.booleans()) else None
    return documents, batch, length, sorted({0, length, *points})


@torch.no_grad()
def _in_pieces(backbone: Backbone, embeddings: Tensor, documents: Tensor | None, points: list[int]) -> BackboneOutput:
    cache = Cache.empty(backbone.sizes, embeddings.shape[0], embeddings.shape[1])
    pieces = []
    for start, end in itertools.pairwise(points):
        piece = None if documents is None else documents[:, start:end]
        pieces.append(backbone(embeddings[:, start:end], piece, cache))
        assert cache.lengths == [end] * embeddings.shape[0]
    batch, layers = embeddings.shape[0], backbone.sizes.layers
    rejoin = [[p.router_logits[layer].unflatten(0, (batch, -1)) for p in pieces] for layer in range(layers)]
    return BackboneOutput(
        torch.cat([p.hidden for p in pieces], 1),
        torch.cat([p.last for p in pieces], 1),
        [torch.cat(parts, 1).flatten(0, 1) for parts in rejoin],
        [],
    )


@pytest.mark.parametrize("sizes", [SIZES, WIDE_LATENT], ids=["tiny", "wide latent"])
@settings(max_examples=40, deadline=None)
@given(case=_splits())
def test_cached_decoding_equals_the_full_forward(
    sizes: config.Backbone, case: tuple[Tensor | None, int, int, list[int]]
) -> None:
    documents, batch, length, points = case
    torch.manual_seed(3)
    backbone = Backbone(sizes).eval()
    embeddings = torch.randn(batch, length, sizes.hidden)
    full = backbone(embeddings, documents)
    pieces = _in_pieces(backbone, embeddings, documents, points)
    torch.testing.assert_close(pieces.hidden, full.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pieces.router_logits, full.router_logits, rtol=1e-5, atol=1e-5)


def test_either_reading_of_the_cache_is_used() -> None:
    wide, narrow = (Backbone(sizes).layers[0].self_attn[0] for sizes in (WIDE_LATENT, SIZES))
    assert narrow._absorbing_is_cheaper(1, 50)
    assert not wide._absorbing_is_cheaper(40, 50)
    assert not narrow._absorbing_is_cheaper(50, 50)


def test_packed_documents_equal_separate_forwards() -> None:
    torch.manual_seed(4)
    backbone = Backbone(SIZES)
    lengths = [5, 1, 6]
    parts = [torch.randn(1, length, SIZES.hidden) for length in lengths]
    documents = torch.cat([torch.full((1, length), number) for number, length in enumerate(lengths)], 1)
    packed = backbone(torch.cat(parts, 1), documents).hidden.split(lengths, 1)
    for part, hidden in zip(parts, packed, strict=True):
        torch.testing.assert_close(hidden, backbone(part).hidden, rtol=1e-5, atol=1e-5)


def test_padding_is_finite_and_touches_nothing() -> None:
    torch.manual_seed(5)
    backbone = Backbone(SIZES)
    embeddings = torch.randn(2, 8, SIZES.hidden)
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1], [-1] * 8])
    embeddings[documents < 0] = 0
    hidden = backbone(embeddings, documents).hidden
    assert hidden.isfinite().all()
    noisy = torch.where((documents < 0)[..., None], 100 * torch.randn(2, 8, SIZES.hidden), embeddings)
    torch.testing.assert_close(backbone(noisy, documents).hidden[documents >= 0], hidden[documents >= 0])


def test_positions_see_only_their_past() -> None:
    torch.manual_seed(6)
    backbone = Backbone(SIZES)
    embeddings = torch.randn(1, 6, SIZES.hidden, requires_grad=True)
    backbone(embeddings).hidden[0, 3].sum().backward()
    assert embeddings.grad is not None
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 4 + [False] * 2


def test_initial_weights_follow_the_seed_and_keep_the_stream_level() -> None:
    def build() -> Backbone:
        torch.manual_seed(7)
        return Backbone(presets.demo().backbone)

    first, second = build(), build()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    out = first(torch.randn(2, 32, first.sizes.hidden))
    assert 0.8 < float(out.last.detach().std()) < 3


@st.composite
def _rows_that_come_and_go(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of the rows when they join, and which of them are still there at each step."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    left = list(range(len(lengths)))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        left = sorted(draw(st.sets(st.sampled_from(left), min_size=1)))
        steps.append(left)
    return lengths, steps


@pytest.mark.parametrize("sizes", [SIZES, WIDE_LATENT], ids=["tiny", "wide latent"])
@settings(max_examples=30, deadline=None)
@given(case=_rows_that_come_and_go())
@torch.no_grad()
def test_rows_of_any_length_decode_as_if_alone(sizes: config.Backbone, case: tuple[list[int], list[list[int]]]) -> None:
    """Rows join with prompts of different lengths, go on together, and drop out."""
    lengths, steps = case
    torch.manual_seed(8)
    backbone = Backbone(sizes).eval()
    rows = [torch.randn(1, length + len(steps), sizes.hidden) for length in lengths]
    cache = Cache.empty(sizes, len(rows), max(lengths) + len(steps))
    cache.latents.normal_()  # what earlier rows left behind
    cache.keep([])
    for row, length in zip(rows, lengths, strict=True):
        number = cache.add_row()
        alone = cache.row(number)
        backbone(row[:, :length], cache=alone)
        cache.lengths[number] = alone.lengths[0]
    alive = list(range(len(rows)))
    for step, left in enumerate(steps):
        cache.keep([alive.index(row) for row in left])
        alive = left
        assert cache.lengths == [lengths[row] + step for row in alive]
        new = torch.cat([rows[row][:, lengths[row] + step, None] for row in alive])
        hidden = backbone(new, cache=cache).hidden[:, 0]
        for found, row in zip(hidden, alive, strict=True):
            whole = backbone(rows[row][:, : lengths[row] + step + 1]).hidden[0, -1]
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_holds_latents_only() -> None:
    cache = Cache.empty(config.Backbone(), batch=1, capacity=2, dtype=torch.bfloat16)
    assert cache.latents.nbytes // cache.capacity == 32_256  # of the released sizes: 28 sub-blocks x 576 x 2 bytes
    held = cache.latents.nbytes + cache.documents.nbytes + cache.text.nbytes
    assert Cache.position_bytes(config.Backbone(), torch.bfloat16) * cache.capacity == held


@torch.no_grad()
def test_bfloat16_decodes() -> None:
    torch.manual_seed(9)
    backbone = Backbone(SIZES).bfloat16()
    embeddings = torch.randn(2, 6, SIZES.hidden, dtype=torch.bfloat16)
    cache = Cache.empty(SIZES, 2, 6, dtype=torch.bfloat16)
    hidden = [backbone(embeddings[:, i : i + 1], cache=cache).hidden for i in range(6)]
    assert hidden[-1].dtype == torch.bfloat16
    assert all(step.isfinite().all() for step in hidden)


def test_refuses_what_does_not_fit() -> None:
    backbone, cache = Backbone(SIZES), Cache.empty(SIZES, 2, 4)
    row = torch.zeros(2, 3, SIZES.hidden)
    with torch.no_grad():
        backbone(row, cache=cache)
        with pytest.raises(ValueError, match=r"capacity of 4, got 3 held \+ 3 new \(make the cache with capacity=6"):
            backbone(row, cache=cache)
        with pytest.raises(ValueError, match=r"Cache: rows must stay 2, got 1"):
            backbone(row[:1, :1], cache=cache)
    assert cache.lengths == [3, 3], "a refusal must leave the cache usable"
    with pytest.raises(ValueError, match="rows must stay within the 2 there is room for"):
        cache.add_row()
    for rows in ([1, 0], [0, 0], [2]):
        with pytest.raises(ValueError, match=r"rows to keep must ascend within \[0, 2\)"):
            cache.keep(rows)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        backbone(row[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"embeddings must be \[B, S, 32\], got \[2, 3, 31\]"):
        backbone(row[..., 1:])
    with pytest.raises(ValueError, match=r"documents must be \[2, 3\] like the embeddings, got \[2, 2\]"):
        backbone(row, torch.zeros(2, 2, dtype=torch.int64))
    odd = dataclasses.replace(SIZES, attention=dataclasses.replace(SIZES.attention, rope_dim=3))
    with pytest.raises(ValueError, match="rope_dim must be even, got 3"):
        Backbone(odd)
    wide = dataclasses.replace(SIZES, attention=dataclasses.replace(SIZES.attention, value_dim=13))
    with pytest.raises(ValueError, match="value_dim must be at most nope_dim \\+ rope_dim = 12, got 13"):
        Backbone(wide)
    with pytest.raises(ValueError, match="batch and capacity must be positive, got 0 and 4"):
        Cache.empty(SIZES, 0, 4)
