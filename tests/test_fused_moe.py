"""Fused experts: token by token, transformers' LongcatFlash with the same weights, and what must not happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from longcat_kernels import fused_moe
from longcat_kernels.modules import MoE


def arguments(
    tokens: int, dim: int, width: int, experts: int, k: int, *, zero: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    floats = {
        "x": torch.randn(tokens, dim, generator=g),
        "gate_up": torch.randn(experts, 2 * width, dim, generator=g) / dim**0.5,
        "down": torch.randn(experts, dim, width, generator=g) / width**0.5,
        "weights": torch.rand(tokens, k, generator=g),
    }
    ids = torch.randint(-1, experts + zero, (tokens, k), generator=g)
    return {**{name: value.to(dtype).requires_grad_() for name, value in floats.items()}, "ids": ids}


def token_by_token(a: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = []
    for x, ids, weights in zip(a["x"], a["ids"].tolist(), a["weights"], strict=True):
        total = x * 0
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= len(a["down"]):
                total = total + weight * x
            elif expert >= 0:
                gate, up = (a["gate_up"][expert] @ x).chunk(2)
                total = total + weight * (a["down"][expert] @ (functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else a["x"] * 0


def leaves(a: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [a[name] for name in ("x", "gate_up", "down", "weights")]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 7),
    dim=st.integers(1, 5),
    width=st.integers(1, 4),
    experts=st.integers(1, 5),
    k=st.integers(1, 4),
    zero=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_equals_token_by_token(
    tokens: int, dim: int, width: int, experts: int, k: int, zero: int, transposed: bool
) -> None:
    a = arguments(tokens, dim, width, experts, k, zero=zero)
    if transposed:
        a = {name: value.detach().mT.contiguous().mT for name, value in a.items()}
        a = {name: value if name == "ids" else value.requires_grad_() for name, value in a.items()}
    got, want = fused_moe(**a), token_by_token(a)
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, leaves(a), grad, allow_unused=True)
    for g, w in zip(torch.autograd.grad(got, leaves(a), grad), wanted, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w)


@pytest.fixture
def theirs() -> Any:
    config = LongcatFlashConfig(
        hidden_size=48, expert_ffn_hidden_size=24, n_routed_experts=6, zero_expert_num=3, moe_topk=4
    )
    torch.manual_seed(0)
    module = LongcatFlashMoE(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    torch.nn.init.normal_(module.router.e_score_correction_bias, std=0.1)
    return module


def test_module_equals_transformers_with_the_same_weights(theirs: Any) -> None:
    scale = theirs.router.routed_scaling_factor
    ours = MoE(hidden=48, width=24, real=6, zero=3, top_k=theirs.router.top_k, scale=scale)
    with torch.no_grad():
        ours.router.load_state_dict(theirs.router.state_dict())
        ours.gate_up.copy_(theirs.experts.gate_up_proj[:6])
        ours.down.copy_(theirs.experts.down_proj)
    x = torch.randn(2, 17, 48, requires_grad=True)
    got, want = ours(x), theirs(x)
    assert scale != 1 and got.ids.max() >= 6, "identity experts must take part"
    torch.testing.assert_close(got.output, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(want)
    got_grads = torch.autograd.grad(got.output, (x, ours.gate_up, ours.down, ours.router.classifier.weight), grad)
    x_, gate_up, down, router = torch.autograd.grad(
        want, (x, theirs.experts.gate_up_proj, theirs.experts.down_proj, theirs.router.classifier.weight), grad
    )
    for g, w in zip(got_grads, (x_, gate_up[:6], down, router), strict=True):
        assert (g - w).norm() <= 2e-6 * w.norm()


def test_an_expert_without_tokens_gets_exact_zeros() -> None:
    a = arguments(9, 8, 4, 4, 2, dtype=torch.float32)
    a["ids"] = torch.where(a["ids"] == 2, 0, a["ids"])
    grads = torch.autograd.grad(fused_moe(**a).sum(), (a["gate_up"], a["down"]))
    assert all((grad[2] == 0).all() and grad.isfinite().all() for grad in grads)


def test_the_weight_pass_runs_only_for_weights_that_want_a_gradient() -> None:
    a = arguments(9, 8, 4, 4, 2, dtype=torch.float32)
    frozen = {**a, "gate_up": a["gate_up"].detach(), "down": a["down"].detach()}
    for call, expected in ((a, 1), (frozen, 0)):
        with torch.profiler.profile() as profile:
            fused_moe(**call).sum().backward()
        assert sum(event.name == "longcat::fused_moe_weight_grad" for event in profile.events()) == expected


def test_saves_its_inputs_and_the_pre_activations_only() -> None:
    a = arguments(64, 32, 16, 4, 3, dtype=torch.float32)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_moe(**a)
    inputs = sum(tensor.nbytes for tensor in a.values())
    assert sum(saved.values()) == inputs + 64 * 3 * 2 * 16 * 4


def test_inference_saves_nothing() -> None:
    a = arguments(8, 8, 4, 2, 2, dtype=torch.float32)
    with torch.no_grad():
        out = fused_moe(**a)
    assert torch.equal(out, fused_moe(**a)) and not out.requires_grad


def test_nan_in_a_row_stays_in_its_row() -> None:
    a = {name: value.detach() for name, value in arguments(9, 8, 4, 4, 2, dtype=torch.float32).items()}
    a["ids"] = a["ids"].abs()
    clean = fused_moe(**a)
    a["x"][4] = torch.nan
    out = fused_moe(**a)
    others = torch.arange(9) != 4
    assert out[4].isnan().all()
    torch.testing.assert_close(out[others], clean[others])


def test_nobody_reads_the_weight_of_an_ignored_slot() -> None:
    a = {name: value.detach() for name, value in arguments(5, 4, 3, 2, 3, dtype=torch.float32).items()}
    clean = fused_moe(**a)
    a["weights"] = a["weights"].masked_fill(a["ids"] < 0, torch.nan)
    assert (a["ids"] < 0).any() and torch.equal(fused_moe(**a), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_router_stays_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = MoE(hidden=8, width=4, real=4, zero=2, top_k=3, scale=6.0), torch.randn(9, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routed = module(x)
    assert torch.equal(routed.router_logits, module.router(x)) and routed.router_logits.dtype == torch.float32
    assert routed.output.dtype == dtype
    routed.output.float().sum().backward()
    assert module.gate_up.grad is not None and module.gate_up.grad.dtype == torch.float32
