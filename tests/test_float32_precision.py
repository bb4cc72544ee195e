"""Products of float32 matrices under `torch.set_float32_matmul_precision`: exact unless it is "medium"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from longcat_kernels import PreparedExperts, fused_moe, grouped_mm, native

pytestmark = pytest.mark.skipif(
    native.why_not() is not None or native.module().build_info()["isa"] != "avx512_bf16",
    reason="fused_moe and grouped_mm, cpu: no products of bfloat16 here",
)
ERROR = 4.6e-3  # of results by the 2-norm: each operand is rounded by up to 2^-9, and products follow products
SIZES = [(211, 88, 72, 9, 3), (64, 96, 64, 40, 2), (90, 75, 33, 2, 3)]  # T D F E k; rows of an expert: some, few, many


@pytest.fixture(autouse=True)
def precision() -> Iterator[Callable[[str], None]]:
    """Sets the precision; leaves it as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def relative(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error by the 2-norm."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


def experts(tokens: int, dim: int, width: int, count: int, k: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    floats = {
        "x": torch.randn(tokens, dim, generator=g),
        "gate_up": torch.randn(count, 2 * width, dim, generator=g) / dim**0.5,
        "down": torch.randn(count, dim, width, generator=g) / width**0.5,
        "weights": torch.rand(tokens, k, generator=g),
    }
    leaves = {name: value.requires_grad_() for name, value in floats.items()}
    return {**leaves, "ids": torch.randint(-1, count + 2, (tokens, k), generator=g)}


def results(a: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """`out`, then the gradients of x, gate_up, down and weights."""
    out = fused_moe(**a, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in a.values() if t.requires_grad], grad)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_kernels(a: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """As `results`, by the kernels themselves."""
    module = native.module()
    x, gate_up, down, ids, weights = (a[n].detach() for n in ("x", "gate_up", "down", "ids", "weights"))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    out, hidden = torch.empty_like(x), torch.empty(ids.numel(), gate_up.shape[1])
    grads = [torch.empty_like(t) for t in (x, weights, hidden, gate_up, down)]
    module.fused_moe(x, gate_up, down, ids, weights, None, [], out, hidden, **options)
    module.fused_moe_input_grad(grad, x, gate_up, down, ids, weights, hidden, *grads[:3], **options)
    module.fused_moe_weight_grad(grad, x, ids, weights, hidden, grads[2], *grads[3:], False, **options)
    return [out, grads[0], grads[3], grads[4], grads[1]]


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_are_as_exact_as_products_of_bfloat16(sizes: tuple[int, ...], poisoned: None) -> None:
    a = experts(*sizes)
    wide = {n: t.detach().double().requires_grad_() if n != "ids" else t for n, t in a.items()}
    for actual, truth in zip(results(a), results(wide), strict=True):
        assert 1e-4 < relative(actual, truth) <= ERROR


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["highest", "high"])
def test_other_settings_change_no_bit(sizes: tuple[int, ...], name: str, precision: Callable[[str], None]) -> None:
    a = experts(*sizes)
    rounded = results(a)
    precision(name)
    exact = results(a)
    assert equal(exact, by_kernels(a, threads=1))
    assert not any(torch.equal(one, other) for one, other in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_without_such_products_stay_exact(isa: str) -> None:
    a = experts(*SIZES[0])
    options = {"threads": 1, "isa": isa}
    assert equal(by_kernels(a, **options), by_kernels(a, **options, products=torch.bfloat16))


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_give_the_same_bits_again(sizes: tuple[int, ...]) -> None:
    """With any number of threads, saved or recomputed, with packed weights or without."""
    a = experts(*sizes)
    once = results(a)
    assert equal(once, by_kernels(a, threads=1, products=torch.bfloat16))
    assert equal(once, by_kernels(a, threads=3, products=torch.bfloat16))
    assert equal(once, results(a, save="x"))
    with torch.no_grad():
        assert torch.equal(once[0], fused_moe(**a, prepared=PreparedExperts(a["gate_up"], a["down"])))


def test_a_token_gets_the_same_bits_alone_and_in_any_company() -> None:
    a = experts(*SIZES[2])
    every = results(a)
    for rows in ([5], [63], list(range(0, 64, 9)), list(range(40, 8, -1))):
        own = {n: a[n].detach()[rows].requires_grad_(n != "ids") for n in ("x", "weights", "ids")}
        out = fused_moe(**{**a, **own})
        assert torch.equal(out, every[0][rows])
        grad = torch.randn(a["x"].shape, generator=torch.Generator().manual_seed(5))[rows]
        grads = torch.autograd.grad(out, (own["x"], own["weights"]), grad)
        assert torch.equal(grads[0], every[1][rows]) and torch.equal(grads[1], every[4][rows])


def test_prepared_experts_follow_the_setting(precision: Callable[[str], None]) -> None:
    a = {name: value.detach() for name, value in experts(*SIZES[0]).items()}
    prepared = PreparedExperts(a["gate_up"], a["down"]).refresh()
    for name in ("highest", "medium"):
        precision(name)
        assert not prepared.is_current
        assert torch.equal(fused_moe(**a, prepared=prepared), fused_moe(**a)) and prepared.is_current


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((119, 67), (5, 67, 45)), ((5, 61, 45), (45, 119)), ((67, 119), (119, 45)), ((5, 67, 33), (5, 33, 45))],
)
def test_grouped_products_are_those_of_rounded_operands(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], poisoned: None
) -> None:
    """Of groups with no, one, few and many rows, whichever way they lie; and so are the gradients."""
    g = torch.Generator().manual_seed(7)
    a, b = torch.randn(shape_a, generator=g), torch.randn(shape_b, generator=g)
    offs = None if a.ndim == b.ndim == 3 else torch.tensor([1, 1, 7, 37, 114])
    rounded = [t.bfloat16().double() for t in (a, b)]
    want = grouped_mm(*rounded, offs)
    grad = torch.randn(want.shape, generator=g)
    wide = grad.bfloat16().double()
    grads = [grouped_mm(wide, rounded[1].mT, offs), grouped_mm(rounded[0].mT, wide, offs)]
    for left, right in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
        leaves = (left.detach().requires_grad_(), right.detach().requires_grad_())
        out = grouped_mm(*leaves, offs)
        for actual, truth in zip([out, *torch.autograd.grad(out, leaves, grad)], [want, *grads], strict=True):
            assert relative(actual, truth) <= 1e-6
        many = torch.full(want.shape, torch.nan)
        native.module().grouped_mm(left, right, offs, many, threads=3, products=torch.bfloat16)
        assert torch.equal(many, out)


def test_other_dtypes_ignore_the_setting(precision: Callable[[str], None]) -> None:
    a, b, offs = torch.randn(24, 16), torch.randn(2, 16, 8), torch.tensor([8, 24])
    narrow = [(a.to(dtype), b.to(dtype)) for dtype in (torch.bfloat16, torch.float16)]
    medium = [grouped_mm(*pair, offs) for pair in narrow]
    precision("highest")
    assert equal(medium, [grouped_mm(*pair, offs) for pair in narrow])


def test_kernels_refuse_other_products() -> None:
    a, b, out = torch.ones(2, 3, 4).half(), torch.ones(2, 4, 5).half(), torch.empty(2, 3, 5).half()
    with pytest.raises(ValueError, match=r"^grouped_mm: products must be the dtype of the tensors, or bfloat16"):
        native.module().grouped_mm(a, b, None, out, threads=1, products=torch.bfloat16)
