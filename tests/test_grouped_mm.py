"""Grouped products: torch's own where it can, each group by itself, gradients of gradients, expanded gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import grouped_mm, native
from longcat_kernels.testing import assert_close

FORMS = ("2x3", "3x2", "2x2", "3x3")


def operands(
    form: str, sizes: list[int], tail: int, sides: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    (p, q), extent, groups = sides, sum(sizes) + tail, len(sizes)
    shapes = {
        "2x3": ((extent, p), (groups, p, q)),
        "3x2": ((groups, p, q), (q, extent)),
        "2x2": ((p, extent), (extent, q)),
        "3x3": ((groups, extent, p), (groups, p, q)),
    }
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype) for shape in shapes[form])
    return a, b, None if form == "3x3" else torch.tensor(sizes).cumsum(0)


def one_by_one(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None, form: str) -> torch.Tensor:
    """Each element of the output from the group that it belongs to."""
    if offs is None:
        return torch.einsum("emk,ekn->emn", a, b)
    extent = {"2x3": a.shape[0], "3x2": b.shape[1], "2x2": a.shape[1]}[form]
    group_R = torch.searchsorted(offs, torch.arange(extent), right=True)
    member_ER = (group_R == torch.arange(len(offs))[:, None]).to(a.dtype)
    return torch.einsum({"2x3": "er,rk,ekn->rn", "3x2": "er,emk,kr->mr", "2x2": "er,mr,rn->emn"}[form], member_ER, a, b)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    tail=st.integers(0, 3),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    strides=st.sampled_from(["rows", "columns", "neither"]),
    int32=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_sum_over_members(
    form: str,
    sizes: list[int],
    tail: int,
    sides: tuple[int, int],
    strides: str,
    int32: bool,
    dtype: torch.dtype,
) -> None:
    a, b, offs = operands(form, sizes, tail, sides, dtype)
    if strides == "columns":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    elif strides == "neither":
        a, b = a.repeat_interleave(2, -1)[..., ::2], b.repeat_interleave(2, -1)[..., ::2]
    got = grouped_mm(a, b, offs.int() if int32 and offs is not None else offs)
    want = one_by_one(a.double(), b.double(), offs, form)
    assert_close(got, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.skipif(native.why_not() is not None, reason=f"grouped_mm, cpu: {native.why_not()}")
def test_every_instruction_set_takes_sides_that_nothing_divides(form: str, isa: str, dtype: torch.dtype) -> None:
    if isa not in native.module().build_info()["isas_available"]:
        pytest.skip(f"grouped_mm, cpu: this processor has no {isa}")
    a, b, offs = operands(form, [1, 0, 6, 30, 77], 5, (67, 45), dtype)
    want = one_by_one(a.double(), b.double(), offs, form)
    for left, right in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
        results = [torch.full(want.shape, torch.nan, dtype=dtype) for _ in range(2)]
        for threads, out in zip((1, 3), results, strict=True):
            native.module().grouped_mm(left, right, offs, out, threads=threads, isa=isa)
        assert torch.equal(*results)
        assert_close(results[0], want)


def test_a_row_gets_the_same_bits_alone_and_in_any_company() -> None:
    a, b, _ = operands("2x3", [64], 0, (50, 40))
    whole = grouped_mm(a, b, torch.tensor([64]))
    for size in (1, 5, 6, 7, 13):
        assert torch.equal(grouped_mm(a[:size], b, torch.tensor([size])), whole[:size])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_where_torch_can(form: str, dtype: torch.dtype) -> None:
    a, b, offs = operands(form, [8, 0, 24, 16], 0, (16, 32), dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    offs = None if offs is None else offs.int()
    got, want = grouped_mm(a, b, offs), torch.nn.functional.grouped_mm(a, b, offs=offs)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    gradients = (torch.autograd.grad(out, (a, b), grad) for out in (got, want))
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("form", FORMS)
def test_is_differentiable_twice(form: str) -> None:
    a, b, offs = operands(form, [2, 0, 3], 1, (2, 3), torch.float64)
    leaves = (a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, offs), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, offs), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_takes_the_expanded_gradient_of_a_sum(form: str) -> None:
    a, b, offs = operands(form, [2, 0, 3], 1, (2, 3))
    leaves = (a.requires_grad_(), b.requires_grad_())
    got = torch.autograd.grad(grouped_mm(a, b, offs).sum(), leaves)
    out = grouped_mm(a, b, offs)
    for g, w in zip(got, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(g, w)


def test_computes_only_the_gradient_that_is_asked_for() -> None:
    a, b, offs = operands("2x3", [2, 3], 0, (2, 3))
    with torch.profiler.profile() as profile:
        grouped_mm(a.requires_grad_(), b, offs).sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("longcat::grouped_mm") == names.count("longcat::grouped_mm_inference") == 1


@pytest.mark.parametrize(("ends", "form"), [([3, 2], "2x3"), ([2, 7], "3x2"), ([-1, 5], "2x2")])
def test_refuses_offsets_that_are_not_ends(ends: list[int], form: str) -> None:
    a, b, _ = operands(form, [2, 3], 0, (2, 3))
    with pytest.raises(ValueError, match=r"grouped_mm: offs must not decrease and lie in \[0, 5\], got"):
        grouped_mm(a, b, torch.tensor(ends))
