"""Routing, grouped products and mixture of experts in Triton's interpreter: every tile, every way to read weights.

Rows a group choose the tile (`_gemm.tile_of`): up to 32 the one of 16 rows, up to 256 that of 64, beyond that of 128,
which is one for sides that 16 divides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_kernels import fused_moe, grouped_mm, moe_plan, moe_route
from longcat_kernels.reference import moe_plan as plan_spec
from longcat_kernels.testing import assert_close

NAMES = ("x", "gate_up", "down", "weights")
FORMS = ("2x3", "3x2", "2x2")


@pytest.fixture(params=["descriptors", "pointers"])
def access(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How kernels read matrices that have aligned rows."""
    from longcat_kernels.triton import _gemm

    if request.param == "pointers":
        monkeypatch.setattr(_gemm, "has_descriptors", lambda device: False)
    elif not _gemm.has_descriptors(torch.device("cpu")):
        pytest.skip("this triton has no tensor descriptors")
    return str(request.param)


def moe(
    tokens: int,
    dim: int,
    width: int,
    experts: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    ids: tuple[int, int] = (-1, 2),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `fused_moe`; ids from the first to `experts` plus the second of `ids`."""
    g = torch.Generator().manual_seed(seed)
    floats = {
        "x": torch.randn(tokens, dim, generator=g),
        "gate_up": torch.randn(experts, 2 * width, dim, generator=g) / dim**0.5,
        "down": torch.randn(experts, dim, width, generator=g) / width**0.5,
    }
    arguments = {name: value.to(dtype) for name, value in floats.items()}
    arguments["weights"] = torch.rand(tokens, k, generator=g)
    arguments["ids"] = torch.randint(ids[0], experts + ids[1], (tokens, k), generator=g)
    return arguments


def passes(arguments: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output of `fused_moe` and its gradients to NAMES."""
    leaves = {name: value.detach().clone() for name, value in arguments.items()}
    for name in NAMES:
        leaves[name].requires_grad_()
    out = fused_moe(**leaves, backend=backend)
    grad = torch.arange(out.numel()).mul(37).remainder(63).sub(31).div(32).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaves[name] for name in NAMES], grad)]


def assert_near(arguments: dict[str, Tensor]) -> None:
    """Output and gradients within a rounding of the truth; float16 also rounds what it keeps inside."""
    half = arguments["x"].dtype == torch.float16
    wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
    for got, want in zip(passes(arguments, "triton"), passes(wide, "reference"), strict=True):
        assert_close(got, want, inner=2.0**-10 if half else 0.0)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(40, torch.float32), (40, torch.float16), (90, torch.float16), (300, torch.float16)]
)
def test_every_tile_equals_the_truth(tokens: int, dtype: torch.dtype, access: str, poisoned: None) -> None:
    assert_near(moe(tokens, 80, 48, 2, 2, dtype))


@pytest.mark.parametrize(("tokens", "dtype"), [(20, torch.float16), (40, torch.float32), (90, torch.float16)])
def test_tiles_of_sides_that_nothing_divides_equal_the_truth(tokens: int, dtype: torch.dtype, poisoned: None) -> None:
    assert_near(moe(tokens, 73, 41, 2, 2, dtype))


def test_sizes_that_tiles_divide_and_weights_that_are_transposed(access: str, poisoned: None) -> None:
    even = moe(40, 64, 64, 2, 2, torch.float16)
    assert_near(even)
    assert_near({name: value.mT.contiguous().mT for name, value in even.items()})


@pytest.mark.parametrize("ids", [(0, 0), (3, 3), (2, 0)], ids=["real only", "identity only", "all to one"])
def test_one_sided_ids(ids: tuple[int, int], poisoned: None) -> None:
    assert_near(moe(19, 24, 17, 3, 1, ids=ids))


def test_descriptors_and_pointers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_kernels.triton import _gemm

    arguments = moe(30, 80, 48, 3, 2)
    first = passes(arguments, "triton")
    monkeypatch.setattr(_gemm, "has_descriptors", lambda device: False)
    assert all(torch.equal(a, b) for a, b in zip(first, passes(arguments, "triton"), strict=True))


def one_order(a: Any, b: Any, dtype: Any) -> Any:
    """A product that adds in order: the bits of numpy's depend on where in the tile a row is."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1] * b[k : k + 1]
    return total


def test_a_token_alone_has_the_bits_it_has_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tile is the same: up to 32 rows an expert."""
    monkeypatch.setattr(np, "matmul", one_order)
    arguments = moe(24, 72, 40, 4, 3)
    out, grad_x, *_, grad_weights = passes(arguments, "triton")
    for token in (0, 7, 23):
        alone = {n: v[token : token + 1] if n in ("x", "ids", "weights") else v for n, v in arguments.items()}
        assert torch.equal(fused_moe(**alone, backend="triton"), out[token : token + 1])
    rest = {n: v[5:] if n in ("x", "ids", "weights") else v for n, v in arguments.items()}
    assert torch.equal(fused_moe(**rest, backend="triton"), out[5:])
    assert grad_x.isfinite().all() and (grad_weights[arguments["ids"] < 0] == 0).all()


def test_nan_stays_in_its_token_and_ignored_weights_are_not_read() -> None:
    arguments = moe(20, 24, 17, 3, 2)
    arguments["ids"][3] = torch.tensor([0, -1])
    clean = fused_moe(**arguments, backend="triton")
    arguments["weights"] = arguments["weights"].masked_fill(arguments["ids"] < 0, torch.nan)
    arguments["x"][3] = torch.nan
    out = fused_moe(**arguments, backend="triton")
    others = torch.arange(20) != 3
    assert out[3].isnan().all() and torch.equal(out[others], clean[others])


def test_main_gradients_are_added_to_and_those_of_idle_experts_left() -> None:
    arguments = moe(30, 24, 17, 4, 2, torch.float16)
    arguments["ids"] = torch.where(arguments["ids"] == 2, 0, arguments["ids"])
    _, _, *wanted = passes(arguments, "triton")[:4]
    main = tuple(torch.ones(grad.shape) for grad in wanted)
    leaves = {n: v.clone().requires_grad_(n in NAMES) for n, v in arguments.items()}
    out = fused_moe(**leaves, main_grads=main, backend="triton")
    grad = torch.arange(out.numel()).mul(37).remainder(63).sub(31).div(32).to(out.dtype).view(out.shape)
    out.backward(grad)
    for total, want in zip(main, wanted, strict=True):
        assert (want[2] == 0).all() and (total[2] == 1).all()
        assert_close((total - 1).half(), want.double(), inner=2.0**-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ends", "tail"), [((20, 20, 50), 14), ((0, 280, 281), 0)])
def test_grouped_products(form: str, ends: tuple[int, ...], tail: int, access: str, poisoned: None) -> None:
    g = torch.Generator().manual_seed(1)
    extent, groups = ends[-1] + tail, len(ends)
    shapes = {
        "2x3": ((extent, 80), (groups, 80, 96)),
        "3x2": ((groups, 80, 48), (48, extent)),
        "2x2": ((80, extent), (extent, 96)),
    }[form]
    a, b = (torch.randn(shape, generator=g).half() for shape in shapes)
    offs = torch.tensor(ends)
    for a_, b_ in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
        want = grouped_mm(a_.double(), b_.double(), offs, backend="reference")
        assert_close(grouped_mm(a_, b_, offs, backend="triton"), want)


def test_without_groups_the_product_is_zero(poisoned: None) -> None:
    none, rows = torch.zeros(0, dtype=torch.int32), torch.ones(3, 4)
    assert not grouped_mm(rows, torch.ones(0, 4, 2), none, backend="triton").any()
    assert not grouped_mm(torch.ones(0, 5, 3), rows, none, backend="triton").any()
    assert grouped_mm(rows.T, torch.ones(3, 2), none, backend="triton").shape == (0, 4, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_any_stride(form: str, dtype: torch.dtype) -> None:
    a, b = {"2x3": ([9, 4], [2, 4, 5]), "3x2": ([2, 5, 4], [4, 9]), "2x2": ([4, 9], [9, 5])}[form]
    offs = torch.tensor([[3, 1], [8, 2]], dtype=dtype)[:, 0]
    operands = torch.randn(a, generator=torch.Generator().manual_seed(1)), torch.ones(b)
    got, want = (grouped_mm(*operands, ends, backend="triton") for ends in (offs, offs.contiguous()))
    assert offs.stride() == (2,) and torch.equal(got, want)


@pytest.mark.parametrize("ends", [[9, 4, 30], [-5, 12, 50], [40, 41, 60]])
def test_wrong_offsets_write_inside_the_output_only(ends: list[int]) -> None:
    from longcat_kernels.triton.grouped_mm import run

    memory = torch.full((3 * 64, 8), 7.0)
    out, offs = memory[64:-64], torch.tensor(ends)
    run(torch.ones(64, 8), torch.ones(3, 8, 8), offs, out)
    assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()
    run(torch.ones(8, 64), torch.ones(64, 8), offs, memory[:24].view(3, 8, 8))
    assert (memory[24:64] == 7).all()


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 300, 700]),
    k=st.integers(1, 4),
    experts=st.integers(1, 40),
    beyond=st.integers(0, 9),
    tile=st.sampled_from([1, 16, 64]),
    seed=st.integers(0, 99),
)
def test_the_plan_is_that_of_the_definition(
    tokens: int, k: int, experts: int, beyond: int, tile: int, seed: int
) -> None:
    """Ids in one block and in several."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + beyond, (tokens, k), generator=g)
    got, want = moe_plan(ids, experts, tile=tile, backend="triton"), plan_spec.moe_plan(ids, experts, tile)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    biased=st.booleans(),
    renorm=st.booleans(),
    grid=st.sampled_from([1.0, 256.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_routing_equals_the_definition(
    tokens: int,
    experts: int,
    share: float,
    score: str,
    biased: bool,
    renorm: bool,
    grid: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    k = 1 + int(share * (experts - 1))
    logits = (
        torch.randn(tokens, experts, generator=g).mul(grid).round().div(grid).to(dtype)
    )  # equal ones on a coarse grid
    bias = torch.randint(-2, 3, (experts,), generator=g).float() if biased else None
    results = []
    for backend, wide in (("triton", logits), ("reference", logits.double())):
        leaf = wide.clone().requires_grad_()
        options: dict[str, Any] = {"n_real": experts, "bias": bias, "score": score, "renorm": renorm, "scale": 2.5}
        weights, ids = moe_route(leaf, k, **options, backend=backend)
        grad = torch.linspace(-1, 1, weights.numel()).view(weights.shape).to(weights.dtype)
        results.append((weights, ids, torch.autograd.grad(weights, leaf, grad)[0]))
    (weights, ids, grad), (want, want_ids, want_grad) = results
    assert_close(weights, want)
    assert torch.equal(ids, want_ids)
    rtol, atol = torch.finfo(dtype).eps, 16 * 2.0**-24 * 2.5  # terms of the gradient are as large as the scale
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol)


def test_routing_of_nan_and_infinity_gives_ids_in_range() -> None:
    logits = torch.randn(4, 6)
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    bias = torch.full((6,), -torch.inf)
    for given_bias in (None, bias):
        got, want = (moe_route(logits, 3, n_real=6, bias=given_bias, backend=b)[1] for b in ("triton", "reference"))
        assert torch.equal(got, want) and got.max() < 6
