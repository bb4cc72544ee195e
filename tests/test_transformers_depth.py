"""CSM's depth decoder and Qwen3-Omni's code predictor by `depth_decode`: the tokens that transformers draws."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CsmDepthDecoderConfig, CsmDepthDecoderForCausalLM
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerCodePredictorConfig

from longcat_kernels import DepthSampling, depth_decode
from longcat_kernels.integrations import csm, qwen3_omni
from longcat_kernels.modules import depth_logits

GREEDY = DepthSampling(temperature=0.0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 0.0078125,
    "low_freq_factor": 0.001953125,
    "original_max_position_embeddings": 16,
}


def livened(model: Any) -> Any:
    """Weights as large as in a trained model: those of initialisation predict nearly the same codes everywhere."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.ndim == 1))
    return model.eval()


def csm_decoder(**changes: Any) -> Any:
    sizes = {
        "num_codebooks": 8,
        "backbone_hidden_size": 20,
        "vocab_size": 51,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 9,
        "rope_parameters": LLAMA3,
    }
    return livened(CsmDepthDecoderForCausalLM(CsmDepthDecoderConfig(**(sizes | changes))))


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True}, {"num_codebooks": 32, "max_position_embeddings": 33}]
)
def test_greedy_tokens_are_those_of_csm(changes: dict[str, Any]) -> None:
    decoder, rows = csm_decoder(**changes), 24
    model = SimpleNamespace(depth_decoder=decoder)
    levels = decoder.config.num_codebooks
    decoder.generation_config.update(do_sample=False, min_new_tokens=levels - 1, max_new_tokens=levels - 1)
    hidden, first = torch.randn(rows, 20), torch.randint(0, 51, (rows, 1))
    call = {"input_ids": torch.nn.functional.pad(first, (1, 0)), "backbone_last_hidden_state": hidden}
    want = decoder.generate(**{name: tensor.clone() for name, tensor in call.items()})
    csm.patch(model)
    got = decoder.generate(**call)
    assert torch.equal(got, want) and len(want.unique()) > 25
    csm.unpatch(model)
    assert "generate" not in vars(decoder)


def test_logits_are_those_of_csm_in_training_too() -> None:
    decoder = csm_decoder()
    hidden, codes = torch.randn(5, 20), torch.randint(0, 51, (5, 8))
    ids = torch.nn.functional.pad(codes[:, :-1], (1, 0))
    want = decoder(input_ids=ids, backbone_last_hidden_state=hidden, use_cache=False).logits
    got = torch.stack(depth_logits(csm.depth_weights(decoder), hidden, codes), 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def reloaded(model: Any) -> Any:
    model.depth_decoder.load_state_dict({name: -x for name, x in model.depth_decoder.state_dict().items()})
    return model


def rounded(model: Any) -> Any:
    reloaded(model).depth_decoder.bfloat16()
    return model


@pytest.mark.parametrize(
    "change",
    [
        reloaded,
        rounded,
        lambda model: reloaded(copy.deepcopy(model)),
        lambda model: reloaded(pickle.loads(pickle.dumps(model))),
    ],
    ids=["loaded", "bfloat16", "copied", "pickled"],
)
def test_weights_that_change_after_the_patch_are_followed(change: Callable[[Any], Any]) -> None:
    model = SimpleNamespace(depth_decoder=csm_decoder())
    hidden, ids = torch.randn(24, 20), torch.zeros(24, 2, dtype=torch.int64)
    model.depth_decoder.generation_config.update(do_sample=False)
    csm.patch(model)
    before = model.depth_decoder.generate(input_ids=ids, backbone_last_hidden_state=hidden)
    changed = change(model)
    there = hidden.to(changed.depth_decoder.dtype)
    got = changed.depth_decoder.generate(input_ids=ids, backbone_last_hidden_state=there)
    weights = csm.depth_weights(changed.depth_decoder)
    assert torch.equal(got[:, 1:], depth_decode(there, weights, GREEDY, prefix=ids[:, 1:]).codes)
    assert not torch.equal(got, before)
    if changed is not model:
        again = model.depth_decoder.generate(input_ids=ids, backbone_last_hidden_state=hidden)
        assert torch.equal(again, before)


def test_samples_follow_the_generation_config() -> None:
    decoder = csm_decoder()
    model = SimpleNamespace(depth_decoder=decoder)
    hidden, ids = torch.randn(64, 20), torch.zeros(64, 2, dtype=torch.int64)
    csm.patch(model)
    drawn = []
    for top_k in (50, 50, 1):
        decoder.generation_config.update(do_sample=True, temperature=0.9, top_k=top_k)
        drawn.append(decoder.generate(input_ids=ids, backbone_last_hidden_state=hidden))
    assert not torch.equal(drawn[0], drawn[1])
    greedy = depth_decode(hidden, csm.depth_weights(decoder), GREEDY, prefix=ids[:, 1:])
    assert torch.equal(drawn[2][:, 1:], greedy.codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias must be False for depth_decode, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu for depth_decode, got gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must have fixed frequencies for depth_decode, got dynamic",
        ),
    ],
)
def test_refuses_what_depth_decode_has_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"csm: {message}"):
        csm.depth_weights(csm_decoder(**changes))


def qwen_talker() -> Any:
    config = Qwen3OmniMoeTalkerCodePredictorConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        num_code_groups=6,
    )
    predictor = livened(qwen.Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration(config))
    embedding = torch.nn.Embedding(60, 16)
    return SimpleNamespace(code_predictor=predictor, get_input_embeddings=lambda: embedding)


def test_greedy_tokens_and_the_next_input_are_those_of_qwen3_omni() -> None:
    talker = qwen_talker()
    predictor, embedding = talker.code_predictor, talker.get_input_embeddings()
    hidden, first = torch.randn(24, 16), torch.randint(0, 60, (24, 1))
    with torch.no_grad():
        inputs = torch.cat([hidden[:, None], embedding(first)], 1)
        want = predictor.generate(inputs_embeds=inputs, max_new_tokens=5, do_sample=False)
        tables = [embedding, *predictor.get_input_embeddings()]
        summed = sum(table(codes) for table, codes in zip(tables, torch.cat([first, want], 1).T, strict=True))
    decoding = depth_decode(hidden, qwen3_omni.depth_weights(talker), GREEDY, prefix=first)
    assert torch.equal(decoding.codes[:, 1:], want) and len(want.unique()) > 20
    torch.testing.assert_close(decoding.embedding, summed)
