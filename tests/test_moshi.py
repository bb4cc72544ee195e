"""Moshi's depformer by `depth_decode`: the tokens that it draws itself, for every way it can be built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency

from longcat_kernels import depth_decode
from longcat_kernels.integrations import moshi as ours
from longcat_kernels.modules import depth_logits

# Its requirements name other versions than ours (torch < 2.10, huggingface-hub < 1): `pip install --no-deps moshi
# sentencepiece` beside this package is enough for its language model.
moshi = pytest.importorskip("moshi.models.lm", reason="moshi: pip install --no-deps moshi sentencepiece")

RELEASED = {
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "norm": "rms_norm_f32",
}
VARIANTS = {
    "released": {},
    "schedule": {"depformer_weights_per_step_schedule": [0, 1, 1, 2, 2, 2]},
    "shared": {"depformer_weights_per_step": False, "depformer_multi_linear": False, "depformer_context": 6},
    "gelu": {"depformer_weights_per_step": False, "depformer_gating": "none", "depformer_context": 6},
    "rope": {"depformer_pos_emb": "rope"},
    "rope_concat, grouped": {"depformer_pos_emb": "rope_concat", "depformer_kv_repeat": 2},
    "norms, biases": {"depformer_norm": "rms_norm_f32", "bias_proj": True},
    "low rank": {"depformer_low_rank_embeddings": 4},
}


def language_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    arguments = {
        "dim": 24,
        "text_card": 11,
        "n_q": 6,
        "dep_q": 6,
        "card": 32,
        "num_heads": 2,
        "num_layers": 1,
        "hidden_scale": 4.125,
        "causal": True,
        "context": 8,
        "max_period": 10000,
        "gating": "silu",
        "positional_embedding": "rope",
        "depformer_dim": 16,
        "depformer_dim_feedforward": 66,
        "depformer_num_heads": 4,
        "depformer_num_layers": 2,
        "delays": [0] * 7,
    }
    changes = RELEASED | changes
    context = changes.pop("depformer_context", None)
    model = moshi.LMModel(**(arguments | changes)).eval()
    for layer in model.depformer.layers if context else ():
        layer.self_attn.context = context  # how many codes its own cache holds where no step has weights of its own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if parameter.ndim > 1 else 0.1) + (parameter.ndim != 2))
        for linear in (m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))):
            linear.weight.sub_(linear.weight.mean())
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_greedy_tokens_are_those_of_moshi(variant: str, guidance: float) -> None:
    model, rows = language_model(**VARIANTS[variant]), 40
    gen = moshi.LMGen(model, use_sampling=False)
    gen.cfg_coef = guidance  # its constructor asks for a model that was trained with conditions
    text, states = torch.arange(rows) % 11, torch.randn(rows * (1 + (guidance != 1)), 1, 24)
    with torch.no_grad():
        want = gen.depformer_step(text, states)
        ours.patch(gen)
        got = gen.depformer_step(text, states)
        ours.unpatch(gen)
    assert torch.equal(got, want) and len(want.unique()) > 16
    assert "depformer_step" not in vars(gen)


def test_logits_are_those_of_moshi_in_training_too() -> None:
    model = language_model()
    codes, states = torch.randint(0, 11, (3, 7, 4)), torch.randn(3, 4, 24)
    want = model.forward_depformer_training(codes, states).transpose(1, 2)  # [rows, frames, codebooks, classes]
    start = model.depformer_text_emb(codes[:, 0]).flatten(0, 1)
    flat = codes[:, 1:].transpose(1, 2).flatten(0, 1)
    got = torch.stack(depth_logits(ours.depth_weights(model), states.flatten(0, 1), flat, start), 1)
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    assert model.depformer.layers[0].self_attn.in_projs[3].weight.grad.abs().sum() > 0


def test_samples_are_of_the_same_distribution_and_new_in_every_frame() -> None:
    model, rows = language_model(card=6), 6000
    gen = moshi.LMGen(model, use_sampling=True, temp=0.9, top_k=4)
    text, states = torch.zeros(rows, dtype=torch.int64), torch.randn(1, 1, 24).expand(rows, -1, -1)
    with torch.no_grad():
        want = gen.depformer_step(text, states)
        ours.patch(gen, seed=5)
        first, second = gen.depformer_step(text, states), gen.depformer_step(text, states)
    assert not torch.equal(first, second)
    for level in range(2):
        counts = torch.stack([torch.bincount(codes[:, level], minlength=6) for codes in (want, first)])
        assert chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue > 1e-4


def reloaded(gen: Any) -> Any:
    gen.lm_model.load_state_dict({name: -x for name, x in gen.lm_model.state_dict().items()})
    return gen


@pytest.mark.parametrize(
    "change",
    [reloaded, lambda gen: reloaded(copy.deepcopy(gen)), torch.nn.Module.double, torch.nn.Module.bfloat16],
    ids=["loaded", "copied", "double", "bfloat16"],
)
def test_weights_that_change_after_the_patch_are_followed(change: Callable[[Any], Any]) -> None:
    gen = moshi.LMGen(language_model(), use_sampling=False)
    text, states = torch.arange(40) % 11, torch.randn(40, 1, 24)
    ours.patch(gen)
    before = gen.depformer_step(text, states)
    changed = change(gen)
    states_there = states.to(changed.lm_model.depformer_in[0].weight.dtype)
    got = changed.depformer_step(text, states_there)
    ours.unpatch(changed)
    ours.patch(changed)
    assert torch.equal(got, changed.depformer_step(text, states_there))
    if changed is not gen:
        assert torch.equal(gen.depformer_step(text, states), before) and not torch.equal(got, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer_norm"}, "norms of the depformer must be RMSNorm of one eps"),
        ({"depformer_norm": "rms_norm"}, "norms of the depformer must be RMSNorm of one eps"),
        ({"depformer_pos_emb": "sin"}, "depformer_pos_emb must be none, rope or rope_concat for depth_decode, got sin"),
        ({"depformer_layer_scale": 0.1}, "depformer_layer_scale must be None"),
        ({"depformer_dim_feedforward": [66, 66, 66, 66, 66, 33]}, "depformer_dim_feedforward must be one number"),
        ({"depformer_gating": "gelu"}, "depformer_gating must be silu"),
    ],
)
def test_refuses_what_depth_decode_has_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"moshi: {message}"):
        ours.depth_weights(language_model(**changes))


def test_weights_are_those_that_depth_decode_takes() -> None:
    weights = ours.depth_weights(language_model())
    assert weights.config.conditioning == "last+hidden" and weights.config.count("attention_sets") == 6
    assert depth_decode(torch.randn(2, 24), weights).codes.shape == (2, 6)
