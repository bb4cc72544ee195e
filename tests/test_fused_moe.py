"""Fused experts: token by token, transformers' LongcatFlash with the same weights, and what must not happen."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LongcatFlashConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from longcat_kernels import PreparedExperts, fused_moe, native
from longcat_kernels.modules import MoE
from longcat_kernels.ops.fused_moe import IMPLS
from longcat_kernels.reference import fused_moe as spec


def relative(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error by the 2-norm; what is all zero must be exactly zero."""
    error, size = (actual.double() - truth).norm().item(), truth.norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def worst_tile(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """The same of the worst tile of 16 columns."""
    return max(relative(a, t) for a, t in zip(actual.split(16, -1), truth.split(16, -1), strict=True))


def gradients(a: dict[str, torch.Tensor], grad: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """`out`, then the gradients of x, gate_up, down and weights."""
    out = fused_moe(**a, **options)
    return [out, *torch.autograd.grad(out, leaves(a), grad)]


def truth(a: dict[str, torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """The same in float64, by the reference."""
    wide = {n: t.detach().double().requires_grad_() if n != "ids" else t for n, t in a.items()}
    return gradients(wide, grad.double())


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


def test_an_expert_without_tokens_gets_exact_zeros(poisoned: None) -> None:
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
        names = [event.name for event in profile.events()]
        assert sum(name.startswith("longcat::fused_moe_weight_grad") for name in names) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("save", "kept"), [("h", 1.0), ("x", 0.0)])
def test_saves_x_and_the_pre_activations_of_real_rows_at_most(dtype: torch.dtype, save: str, kept: float) -> None:
    a = arguments(256, 512, 128, 8, 4, zero=4, dtype=dtype)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_moe(**a, save=save)
    rows = int(((a["ids"] >= 0) & (a["ids"] < 8)).sum())
    assert rows < 0.8 * a["ids"].numel(), "identity experts must take part"
    activations = sum(saved.values()) - a["gate_up"].nbytes - a["down"].nbytes
    assert activations <= 1.05 * (a["x"].nbytes + kept * rows * 2 * 128 * dtype.itemsize)


def test_inference_is_an_op_of_its_own_with_the_same_bits() -> None:
    a = arguments(24, 16, 12, 4, 3, dtype=torch.float32)
    plain = {name: value.detach() for name, value in a.items()}
    out = fused_moe(**a)
    assert out.requires_grad and torch.equal(fused_moe(**plain), out)
    operands = (plain["x"], plain["gate_up"], plain["down"], plain["ids"], plain["weights"])
    torch.library.opcheck(
        torch.ops.longcat.fused_moe_inference.default, (*operands, None, None, None, [], 0, True, "auto")
    )


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


@pytest.mark.parametrize("backend", IMPLS)
def test_nan_of_a_token_that_no_expert_has_goes_nowhere(backend: str) -> None:
    a = arguments(9, 8, 4, 4, 2, dtype=torch.float32)
    a["ids"][4] = -1
    with torch.no_grad():
        a["x"][4] = torch.nan
    out = fused_moe(**a, backend=backend)
    grads = torch.autograd.grad(out, leaves(a), torch.ones_like(out))
    assert (out[4] == 0).all() and all(tensor.isfinite().all() for tensor in (out, *grads))
    operands = (a["x"], a["gate_up"], a["down"], a["ids"], a["weights"])
    torch.testing.assert_close(out, spec.fused_moe(*operands, None, None, None, [], 0, True)[0])


def test_nobody_reads_the_weight_of_an_ignored_slot() -> None:
    a = {name: value.detach() for name, value in arguments(5, 4, 3, 2, 3, dtype=torch.float32).items()}
    clean = fused_moe(**a)
    a["weights"] = a["weights"].masked_fill(a["ids"] < 0, torch.nan)
    assert (a["ids"] < 0).any() and torch.equal(fused_moe(**a), clean)


# Of out and of the gradients of x, gate_up, down and weights.
TOLERANCES = {
    torch.float32: [1.5e-6] * 5,
    torch.bfloat16: [3.5e-3, 4.2e-3, 3.7e-3, 4.2e-3, 3.3e-3],
    torch.float16: [5e-4, 6e-4, 6e-4, 6e-4, 5e-4],
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("outlier", [1.0, 30.0], ids=["plain", "outlier"])
@pytest.mark.parametrize(("experts", "width"), [(9, 72), (2, 40), (70, 33)], ids=["some", "full", "few"])
def test_is_as_exact_as_its_dtype_allows(
    dtype: torch.dtype, outlier: float, experts: int, width: int, poisoned: None
) -> None:
    """Experts with a few rows, with some and with hundreds; sides that no tile and no panel divides."""
    a = arguments(211, 88, width, experts, 3, zero=experts // 2, dtype=dtype)
    with torch.no_grad():
        a["x"][::17] *= outlier
    grad = torch.randn(211, 88, generator=torch.Generator().manual_seed(5)).to(dtype)
    got, wanted = gradients(a, grad), truth(a, grad)
    for actual, want, allowed in zip(got, wanted, TOLERANCES[dtype], strict=True):
        assert relative(actual, want) <= allowed
    for actual, want, allowed in zip(got[:4], wanted[:4], TOLERANCES[dtype], strict=False):
        assert worst_tile(actual, want) <= 2 * allowed
    assert max(relative(a, t) for a, t in zip(got[0], wanted[0], strict=True)) <= 3 * TOLERANCES[dtype][0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 40)),
    experts=st.integers(1, 6),
    k=st.integers(1, 4),
    zero=st.integers(0, 3),
    dtype=st.sampled_from(list(TOLERANCES)),
    transposed=st.booleans(),
    save=st.sampled_from(["h", "x"]),
)
def test_any_size_and_any_strides(
    sizes: tuple[int, int, int],
    experts: int,
    k: int,
    zero: int,
    dtype: torch.dtype,
    transposed: bool,
    save: str,
) -> None:
    a = arguments(*sizes, experts, k, zero=zero, dtype=dtype)
    residual = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    if transposed:
        a = {name: value.detach().mT.contiguous().mT for name, value in a.items()}
        a = {name: value if name == "ids" else value.requires_grad_() for name, value in a.items()}
    grad = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(5)).to(dtype)
    out = fused_moe(**a, residual=residual, save=save)
    *got, grad_residual = torch.autograd.grad(out, [*leaves(a), residual], grad)
    wanted = truth(a, grad)
    wanted[0] = wanted[0] + residual.detach().double()
    positive = {name: value if name == "ids" else value.detach().abs().requires_grad_() for name, value in a.items()}
    sums = truth(positive, grad.abs())
    sums[0] = sums[0] + residual.detach().double().abs()
    for actual, want, terms, allowed in zip([out, *got], wanted, sums, TOLERANCES[dtype], strict=True):
        # Small results of large terms cancel: the largest one is the measure; where there are few, their terms are.
        measure = (want if want.numel() >= 64 else terms).abs().max().item() if want.numel() else 0
        torch.testing.assert_close(actual.double(), want, rtol=0, atol=8 * allowed * measure + 1e-12)
    assert torch.equal(grad_residual, grad)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(50, 24), (64, 48)], ids=["panels with gaps", "full panels"])
def test_a_token_gets_the_same_bits_alone_and_in_any_company(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Experts of one row read weights as they lie; of many, pack them, full panels meanwhile: no sum may know."""
    a = {name: value.detach() for name, value in arguments(64, *sizes, 3, 2, dtype=dtype).items()}
    grad = torch.randn(64, sizes[0], generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(rows: torch.Tensor) -> list[torch.Tensor]:
        own = {n: a[n][rows].requires_grad_(n != "ids") for n in ("x", "ids", "weights")}
        out = fused_moe(**{**a, **own})
        return [out.detach(), *torch.autograd.grad(out, (own["x"], own["weights"]), grad[rows])]

    every = run(torch.arange(64))
    for rows in ([5], [63], list(range(0, 64, 9)), list(range(40, 8, -1))):
        for part, whole in zip(run(torch.tensor(rows)), every, strict=True):
            assert torch.equal(part, whole[rows])


def passes(a: dict[str, torch.Tensor], grad: torch.Tensor, isa: str, threads: int) -> list[torch.Tensor]:
    """out and the four gradients by the kernels of one instruction set."""
    module, options = native.module(), {"threads": threads, "isa": isa}
    x, gate_up, down, ids, weights = (a[n].detach() for n in ("x", "gate_up", "down", "ids", "weights"))
    out, hidden = torch.empty_like(x), torch.empty(ids.numel(), gate_up.shape[1], dtype=x.dtype)
    grads = [torch.empty_like(t) for t in (x, weights, hidden, gate_up, down)]
    module.fused_moe(x, gate_up, down, ids, weights, None, [], out, hidden, **options)
    module.fused_moe_input_grad(grad, x, gate_up, down, ids, weights, hidden, *grads[:3], **options)
    module.fused_moe_weight_grad(grad, x, ids, weights, hidden, grads[2], *grads[3:], False, **options)
    return [out, grads[0], grads[3], grads[4], grads[1]]


@pytest.mark.skipif(native.why_not() is not None, reason=f"fused_moe, cpu: {native.why_not()}")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(75, 44), (64, 48)], ids=["panels with gaps", "full panels"])
def test_every_instruction_set_is_exact_whatever_the_threads(
    isa: str, dtype: torch.dtype, sizes: tuple[int, int], poisoned: None
) -> None:
    if isa not in native.module().build_info()["isas_available"]:
        pytest.skip(f"fused_moe, cpu: this processor has no {isa}")
    a = arguments(90, *sizes, 5, 3, dtype=dtype)
    a["weights"] = a["weights"].detach().float().requires_grad_()
    grad = torch.randn(90, sizes[0], generator=torch.Generator().manual_seed(5)).to(dtype)
    results = passes(a, grad, isa, 1)
    assert all(torch.equal(one, many) for one, many in zip(results, passes(a, grad, isa, 3), strict=True))
    for actual, wanted, allowed in zip(results, truth(a, grad), TOLERANCES[dtype], strict=True):
        assert relative(actual, wanted) <= allowed


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_narrow_weights_of_identity_experts_are_added_up_in_float32(backend: str) -> None:
    a = {name: value.detach() for name, value in arguments(64, 8, 4, 2, 6, dtype=torch.float32).items()}
    a["ids"], a["weights"] = torch.full_like(a["ids"], 2), a["weights"].bfloat16()
    want = a["weights"].double().sum(1, keepdim=True) * a["x"].double()
    assert relative(fused_moe(**a, backend=backend), want) <= TOLERANCES[torch.float32][0]


def test_recomputing_gives_the_same_bits_as_saving() -> None:
    a = arguments(40, 33, 20, 4, 3, dtype=torch.bfloat16)
    grad = torch.randn(40, 33, generator=torch.Generator().manual_seed(5)).bfloat16()
    for kept, computed in zip(gradients(a, grad), gradients(a, grad, save="x"), strict=True):
        assert torch.equal(kept, computed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adds_to_main_gradients_in_float32(dtype: torch.dtype) -> None:
    a = arguments(40, 33, 20, 4, 3, dtype=dtype)
    with torch.no_grad():
        a["ids"] = torch.where(a["ids"] == 1, 0, a["ids"])
    main = (torch.ones(a["gate_up"].shape), torch.full(a["down"].shape, 2.0))
    fused_moe(**a, main_grads=main).sum().backward()
    fused_moe(**a, main_grads=main).sum().backward()
    assert a["gate_up"].grad is None and a["down"].grad is None and a["x"].grad is not None
    wanted = truth(a, torch.ones(40, 33))
    for got, start, grad in zip(main, (1, 2), wanted[2:4], strict=True):
        assert (got[1] == start).all(), "the gradients of an expert without tokens must stay as they were"
        assert relative(got - start, 2 * grad) <= TOLERANCES.get(dtype, TOLERANCES[torch.float32])[3]
    with pytest.raises(ValueError, match="main_grads must be a pair of tensors, got one and None"):
        fused_moe(**a, main_grads=(main[0], None))


@pytest.mark.parametrize("wanted", [("gate_up",), ("down",), ("x",)])
def test_gives_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    a = arguments(30, 16, 8, 4, 2, dtype=torch.float32)
    full = dict(zip(("x", "gate_up", "down", "weights"), gradients(a, torch.ones(30, 16))[1:], strict=True))
    frozen = {name: value.detach().requires_grad_(name in wanted) for name, value in a.items()}
    fused_moe(**frozen).sum().backward()
    for name, value in frozen.items():
        assert (value.grad is not None) == (name in wanted)
        if value.grad is not None:
            assert torch.equal(value.grad, full[name])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_prepared_experts_change_no_bit_and_follow_their_weights(dtype: torch.dtype) -> None:
    a = {name: value.detach() for name, value in arguments(50, 40, 21, 3, 2, dtype=dtype).items()}
    prepared = PreparedExperts(a["gate_up"], a["down"])
    for _ in range(2):
        assert torch.equal(fused_moe(**a, prepared=prepared), fused_moe(**a)) and prepared.is_current
        a["gate_up"].mul_(0.5)
        assert not prepared.is_current
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again.gate_up, a["gate_up"]) and not again.is_current


def test_prepared_experts_refuse_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^PreparedExperts: gate_up and down must be "):
        PreparedExperts(torch.ones(2, 8, 4), torch.ones(2, 4, 3))


def test_is_more_exact_in_bfloat16_than_transformers_grouped_experts() -> None:
    a = arguments(128, 96, 64, 6, 3, zero=0, dtype=torch.bfloat16)
    a["ids"] = a["ids"].clamp(min=0)
    theirs = SimpleNamespace(
        num_experts=6,
        gate_up_proj=a["gate_up"],
        down_proj=a["down"],
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=False,
        _apply_gate=lambda h: functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    )
    grad = torch.randn(128, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    out = grouped_mm_experts_forward(theirs, a["x"], a["ids"], a["weights"])
    peer = [out, *torch.autograd.grad(out, leaves(a), grad)]
    for ours, other, wanted in zip(gradients(a, grad), peer, truth(a, grad), strict=True):
        assert relative(ours, wanted) <= 0.85 * relative(other, wanted)


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
