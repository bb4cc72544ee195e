"""Grouped products: torch's own where it can, each group by itself, gradients of gradients, expanded gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
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
    return a, b, None if form == "3x3" else torch.tensor(sizes, dtype=torch.int64).cumsum(0)


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
    sizes=st.lists(st.integers(0, 5), max_size=5),
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


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    sizes=st.lists(st.integers(0, 3).map(lambda n: 8 * n), max_size=4),
    tail=st.sampled_from([0, 8]),
    more=st.sampled_from([0, 0, 0, 8]),
    sides=st.tuples(st.sampled_from([0, 1, 5, 8, 16]), st.sampled_from([1, 3, 8, 16])),
    columns=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    out_dtype=st.booleans(),
)
def test_takes_what_torch_takes(
    form: str,
    sizes: list[int],
    tail: int,
    more: int,
    sides: tuple[int, int],
    columns: tuple[bool, bool],
    dtype: torch.dtype,
    out_dtype: bool,
) -> None:
    """Whatever torch gives a result for, with its groups in order: ours is the same."""
    a, b, offs = operands(form, sizes, tail, sides, dtype)
    if form == "2x2" and more:  # torch lets the longer of two ragged sides have a rest
        b = torch.cat([b, b.new_ones(more, b.shape[1])])
    a, b = (t.mT.contiguous().mT if turned else t for t, turned in zip((a, b), columns, strict=True))
    how = {"bias": None, "out_dtype": dtype if out_dtype else None}
    ends = None if offs is None else offs.int()
    try:
        want = torch.nn.functional.grouped_mm(a, b, offs=ends, **how)
    except RuntimeError:  # sides that are no multiples of 16 bytes: to take them is what torch does not promise
        assume(False)
    got = grouped_mm(a, b, ends, **how)
    assert got.dtype == want.dtype and got.shape == want.shape
    rows = got if ends is None or form == "2x2" else got.narrow(int(form == "3x2"), 0, sum(sizes))
    torch.testing.assert_close(rows, want[tuple(map(slice, rows.shape))])


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_groups_all_is_zero_and_gets_zeros(backend: str) -> None:
    none, rows = torch.zeros(0, dtype=torch.int32), torch.ones(3, 4)
    for a, b in ((rows, torch.ones(0, 4, 2)), (torch.ones(0, 5, 3), rows), (rows, torch.ones(4, 2))):
        leaves = (a.clone().requires_grad_(), b.clone().requires_grad_())
        out = grouped_mm(*leaves, none, backend=backend)
        assert not out.any() and (out.ndim == 2 or out.shape == (0, 3, 2))
        assert not any(grad.any() for grad in torch.autograd.grad(out, leaves, torch.ones_like(out)))


def test_a_rest_of_either_side_is_left_out_of_sums() -> None:
    a, b, offs = operands("2x2", [2, 3], 0, (2, 3))
    longer = torch.cat([a, torch.full((2, 4), torch.nan)], 1).requires_grad_()
    got = grouped_mm(longer, b, offs)
    assert torch.equal(got, grouped_mm(a, b, offs))
    (grad,) = torch.autograd.grad(got.sum(), longer)
    assert grad[:, :5].all() and not grad[:, 5:].any()
    assert torch.equal(grouped_mm(b.mT, longer.mT, offs), grouped_mm(b.mT, a.mT, offs))


def test_refuses_a_bias_and_another_dtype_as_torch_does() -> None:
    a, b, offs = operands("2x3", [8, 8], 0, (8, 8))
    for how in ({"bias": torch.ones(8)}, {"out_dtype": torch.bfloat16}, {"out_dtype": torch.float64}):
        with pytest.raises(ValueError, match=rf"grouped_mm: {next(iter(how))} must be None"):
            grouped_mm(a, b, offs, **how)
        with pytest.raises(RuntimeError):
            torch.nn.functional.grouped_mm(a, b, offs=offs.int(), **how)


@pytest.mark.parametrize(("ends", "form"), [([3, 2], "2x3"), ([2, 7], "3x2"), ([-1, 5], "2x2")])
def test_refuses_offsets_that_are_not_ends(ends: list[int], form: str) -> None:
    a, b, _ = operands(form, [2, 3], 0, (2, 3))
    with pytest.raises(ValueError, match=r"grouped_mm: offs must not decrease and lie in \[0, 5\], got"):
        grouped_mm(a, b, torch.tensor(ends))
