"""transformers' LongcatFlash with our experts: the same numbers and gradients, a smaller model, old checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.longcat_flash import modeling_longcat_flash as modeling

from longcat_kernels.integrations import transformers as integration

REAL, ZERO = 5, 3


def config(**changes: Any) -> hf.LongcatFlashConfig:
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 48,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4,
        "v_head_dim": 8, "moe_topk": 3, "n_routed_experts": REAL, "zero_expert_num": ZERO,
        "expert_ffn_hidden_size": 12, "routed_scaling_factor": 2.5, "attn_implementation": "eager",
    }  # fmt: skip
    return hf.LongcatFlashConfig(**sizes | changes)


def model(**changes: Any) -> hf.LongcatFlashForCausalLM:
    """With weights that nothing may hide behind."""
    built = hf.LongcatFlashForCausalLM(config(**changes)).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            scale = 0.02 if "correction_bias" in name else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=g) * scale + (1.0 if "norm" in name else 0.0))
    return built


@pytest.fixture
def patched() -> Iterator[None]:
    integration.patch()
    yield
    integration.unpatch()


def everything(built: hf.LongcatFlashForCausalLM) -> dict[str, Tensor]:
    """Logits of fixed ids, and the gradients of all parameters."""
    g = torch.Generator().manual_seed(1)
    logits = built(torch.randint(0, 50, (2, 13), generator=g), use_cache=False).logits
    built.zero_grad()
    (logits * torch.randn(logits.shape, generator=g)).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in built.named_parameters()}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        value = value[: len(got[name])] if "gate_up_proj" in name else value
        found = got[name][: len(value)]
        assert (found - value).norm() <= tolerance * value.norm(), name
        assert value.norm() > 0, name


def test_the_whole_model_is_the_same_before_and_after() -> None:
    old = model()
    want = everything(old)
    integration.patch()
    try:
        assert_same(everything(old), want, 1e-5)
        new = hf.LongcatFlashForCausalLM(config()).eval()
        new.load_state_dict(old.state_dict())
        assert_same(everything(new), want, 1e-5)
    finally:
        integration.unpatch()
    assert_same(everything(new), want, 1e-5)


def moe_step(moe: Any) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 40, 32, generator=g, requires_grad=True)
    out = moe(x)
    moe.zero_grad()
    (out * torch.randn(out.shape, generator=g)).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}}


def test_the_mixture_of_experts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = model().model.layers[0].mlp
    chosen = moe.router(torch.randn(80, 32, generator=torch.Generator().manual_seed(2)))[2]
    assert (chosen >= REAL).any() and (chosen < REAL).any()
    want = moe_step(moe)
    calls: list[int] = []
    fused_moe = integration.fused_moe
    monkeypatch.setattr(integration, "fused_moe", lambda *a: calls.append(1) or fused_moe(*a))
    integration.patch()
    try:
        got = moe_step(moe)
    finally:
        integration.unpatch()
    assert calls == [1]
    assert_same(got, want, 2e-6)


def test_allocates_real_experts_only_and_initializes_them(patched: None) -> None:
    built = hf.LongcatFlashForCausalLM(config())
    experts = built.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (REAL, 24, 32) and experts.down_proj.shape == (REAL, 32, 12)
    assert 0 < experts.gate_up_proj.std() < 0.1 and 0 < experts.down_proj.std() < 0.1


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_either_size_load_into_models_of_either_size(patched: None, assign: bool) -> None:
    integration.unpatch()
    big = model()
    integration.patch()
    small = hf.LongcatFlashForCausalLM(config()).eval()
    want = everything(big)
    small.load_state_dict(big.state_dict(), assign=assign)
    experts = small.model.layers[0].mlp.experts
    assert experts.gate_up_proj.untyped_storage().nbytes() == experts.gate_up_proj.nbytes
    assert_same(everything(small), want, 1e-5)
    again = hf.LongcatFlashForCausalLM(config()).eval()
    again.load_state_dict(small.state_dict(), assign=assign)
    assert_same(everything(again), want, 1e-5)
    for layer in big.model.layers:
        layer.mlp.experts.gate_up_proj.data.zero_()
    big.load_state_dict(small.state_dict(), assign=assign)
    assert_same(everything(big), want, 1e-5)


def test_checkpoints_of_either_size_load(tmp_path: Path) -> None:
    """Those that transformers writes hold weights of identity experts; released ones do not, and it refuses them."""
    big = model()
    want = everything(big)
    big.save_pretrained(tmp_path / "big")
    integration.patch()
    try:
        small = hf.LongcatFlashForCausalLM.from_pretrained(tmp_path / "big", attn_implementation="eager").eval()
        assert_same(everything(small), want, 1e-5)
        small.save_pretrained(tmp_path / "small")
        names = load_file(tmp_path / "small" / "model.safetensors").keys()
        assert not any(f"experts.{REAL}." in name for name in names)
        again = hf.LongcatFlashForCausalLM.from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
        assert_same(everything(again), want, 1e-5)
    finally:
        integration.unpatch()
    with pytest.raises(RuntimeError):
        hf.LongcatFlashForCausalLM.from_pretrained(tmp_path / "small")


def state() -> tuple[Any, ...]:
    """What patching may change."""
    experts = modeling.LongcatFlashExperts
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("longcat_flash")
    return (dict(vars(experts)), list(ALL_EXPERTS_FUNCTIONS.keys()), [str(c.operations) for c in mapping])


def test_patching_twice_is_patching_once_and_unpatching_restores() -> None:
    before = state()
    integration.unpatch()
    assert state() == before
    integration.patch()
    once = state()
    integration.patch()
    assert state() == once != before
    integration.unpatch()
    integration.unpatch()
    assert state() == before


def test_other_activations_stay_as_they_are() -> None:
    moe = model(hidden_act="gelu").model.layers[0].mlp
    want = moe_step(moe)
    integration.patch()
    try:
        assert_same(moe_step(moe), want, 0.0)
    finally:
        integration.unpatch()


def test_identity_experts_alone(patched: None) -> None:
    moe = model(n_routed_experts=0, moe_topk=2).model.layers[0].mlp
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    weights = moe.router(x)[1]
    torch.testing.assert_close(moe(x)[0], weights.sum(1, keepdim=True) * x[0])


def test_other_models_may_ask_for_it(patched: None) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_key_value_heads": 2}
    built = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **experts, intermediate_size=32)).eval()
    results = []
    for implementation in ("eager", "longcat"):
        built.set_experts_implementation(implementation)
        results.append(everything(built))
    assert_same(results[1], results[0], 1e-5)
    built.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="experts_forward: experts must be SwiGLU"):
        everything(built)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
        with pytest.raises(ImportError, match=r"patch: transformers must be at least 5, got 4\.57\.1"):
            integration.patch()
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="patch: transformers must be at least 5, got none"):
        integration.patch()
