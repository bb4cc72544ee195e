"""rvq_encode in Triton's interpreter: bits of the definition on hard data, and that the screen keeps its promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_kernels import rvq_encode
from longcat_kernels.layouts import HalfLayout
from longcat_kernels.reference import rvq_encode as spec


def encode(x: Tensor, books: list[Tensor], packed: list[Tensor] | None = None, **how: Any) -> tuple[Tensor, ...]:
    """quantized, residual, losses and codes by the kernels."""
    from longcat_kernels.triton import rvq_encode as kernels

    rows, width = x.shape
    outputs = (
        torch.full_like(x, torch.nan),
        torch.full((rows, width), torch.nan),
        torch.full((len(books),), torch.nan),
        torch.full((rows, len(books)), -9),
    )
    kernels.run(x, books, packed or [], None, None, torch.float32, *outputs, **how)
    return outputs


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """The same bits; losses within a rounding."""
    for name, a, b in zip(("quantized", "residual", "losses", "codes"), got, want, strict=True):
        if name == "losses":
            torch.testing.assert_close(a, b.float(), rtol=2.0**-23, atol=2.0**-149, equal_nan=True)
        else:
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


def defined(x: Tensor, books: list[Tensor]) -> tuple[Tensor, ...]:
    return spec.rvq_encode(x, books, [], None, None, torch.float32)


def screened(x: Tensor, book: Tensor, tile: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Least upper bound [N], the three least lower bounds [N, 3, tiles], and the entries of the first two."""
    from longcat_kernels.triton import _screen
    from longcat_kernels.triton import rvq_encode as kernels

    seen = []
    original = kernels._screen

    def record(*arguments: Any) -> tuple[Tensor, int]:
        seen.append(original(*arguments))
        return seen[-1]

    kernels._screen = record
    try:
        encode(x, [book], tiles=_screen.Cut(64, tile, 4, 2))
    finally:
        kernels._screen = original
    key = seen[0][0]
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)
    entry = (key & (tile - 1)) + tile * torch.arange(key.shape[2])
    return value[:, 0].amin(1), value[:, 1:], entry[:, 1:3]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 70),
    entries=st.lists(st.integers(1, 90), min_size=1, max_size=2),
    grid=st.sampled_from([1.0, 4.0, 256.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_to_the_bit(
    rows: int,
    width: int,
    entries: list[int],
    grid: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    masked: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    # On a coarse grid many distances are equal, so the tie rule decides.
    x = torch.randn(width, rows, generator=g).mul(grid).round().div(grid).to(dtype).T
    books = [torch.randn(k, width, generator=g).mul(grid).round().div(grid) for k in entries]
    mask = torch.rand(rows, generator=g) < 0.7 if masked else None
    arguments: dict[str, Any] = {"x": x, "codebooks": books, "mask": mask, "residual_dtype": residual_dtype}
    got, want = (rvq_encode(**arguments, backend=name) for name in ("triton", "reference"))
    assert_same(
        (got.quantized, got.residual, got.losses, got.codes), (want.quantized, want.residual, want.losses, want.codes)
    )


def hard(data: str, rows: int = 40, width: int = 70, entries: int = 150) -> tuple[Tensor, list[Tensor]]:
    case = spec.Case((rows,), width, (entries,), data=data)
    arguments = spec.inputs(case, seed=5)
    return arguments["x"].detach(), arguments["codebooks"]


@pytest.mark.parametrize("tile", [(16, 64), (64, 128)], ids=["16 x 64", "64 x 128"])
@pytest.mark.parametrize("data", ["normal", "near ties", "common mean", "six decades"])
def test_is_exact_on_hard_data_however_the_entries_are_cut(data: str, tile: tuple[int, int]) -> None:
    from longcat_kernels.triton._screen import Cut

    x, books = hard(data)
    assert_same(encode(x, books, tiles=Cut(*tile, warps=4, stages=2)), defined(x, books))


def test_rows_with_many_nearest_codewords_are_scanned() -> None:
    g = torch.Generator().manual_seed(0)
    few = torch.randn(3, 20, generator=g)
    book = few[torch.arange(300) % 3]
    x = few[torch.arange(7) % 3] + 0.01 * torch.randn(7, 20, generator=g)
    best, lower, _ = screened(x, book)
    assert (lower[:, 2] <= best[:, None]).any(1).all(), "more than two candidates in a tile"
    assert encode(x, [book])[3][:, 0].tolist() == [row % 3 for row in range(7)]


def test_near_duplicates_in_their_hundreds_are_told_apart() -> None:
    g = torch.Generator().manual_seed(1)
    centre = torch.randn(1, 40, generator=g)
    book = centre * (1 + 2.0**-20 * torch.randn(200, 40, generator=g))
    x = (centre * (1 + 2.0**-20 * torch.randn(9, 40, generator=g))).contiguous()
    assert_same(encode(x, [book]), defined(x, [book]))
    assert encode(x, [book])[3].unique().numel() > 5


SCALES = [1e-42, 1e-30, 1e-20, 1e-10, 1e13, 1e14, 1e15, 1e18, 1e30, 1e36]


@pytest.mark.parametrize("x_scale", [1e-42, 1e-20, 1.0, 1e14, 1e15, 1e36])
@pytest.mark.parametrize("book_scale", [1e-42, 1e-20, 1.0, 1e14, 1e15, 1e36])
def test_any_scale_is_exact(x_scale: float, book_scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    x, book = torch.randn(6, 9, generator=g) * x_scale, torch.randn(20, 9, generator=g) * book_scale
    assert_same(encode(x, [book]), defined(x, [book]))


def test_some_huge_or_tiny_codewords_and_rows_among_others_are_exact() -> None:
    g = torch.Generator().manual_seed(4)
    x, book = torch.randn(40, 12, generator=g), torch.randn(90, 12, generator=g)
    for step, scale in enumerate(SCALES):
        x[3 * step] *= scale
        book[5 * step] *= scale
        book[5 * step + 1, step] = torch.finfo(torch.float32).max
    x[31, 0], x[32, 0] = torch.finfo(torch.float32).max, 2.0**-149
    assert_same(encode(x, [book, book]), defined(x, [book, book]))


def test_codewords_that_are_not_numbers_leave_the_others_exact() -> None:
    g = torch.Generator().manual_seed(6)
    x, book = torch.randn(20, 12, generator=g), torch.randn(70, 12, generator=g)
    for entry, bad in ((0, torch.nan), (5, torch.inf), (64, -torch.inf)):
        book[entry, 3] = bad
    x[4, 2], x[5, 0] = torch.nan, torch.inf
    assert_same(encode(x, [book, book]), defined(x, [book, book]))


def test_packed_once_or_in_every_call_gives_the_same_bits() -> None:
    from longcat_kernels.triton._pack import pack

    x, books = hard("normal")
    packed = [torch.zeros(HalfLayout(*book.shape).bytes, dtype=torch.uint8) for book in books]
    for book, form in zip(books, packed, strict=True):
        pack(book, form)
    want = encode(x, books)
    assert_same(encode(x, books, packed), want)
    assert_same(encode(x, books, [form[:-1] for form in packed]), want)  # another layout: not taken


def test_codebooks_that_share_memory_are_told_apart() -> None:
    x, (book,) = hard("normal")
    books = [book, book[:60], book[:61], book]
    assert_same(encode(x, books), defined(x, books))


@pytest.mark.parametrize("data", ["normal", "common mean", "six decades"])
def test_the_bounds_hold(data: str) -> None:
    x, (book,) = hard(data, rows=64, entries=256)
    best, lower, entry = screened(x, book)
    centre = book.double().mean(0).float().double()
    d, rho = book.double() - centre, x.double() - centre
    half_scores = d.square().sum(1) / 2 - rho @ d.T
    assert (best >= half_scores.amin(1)).all()
    for rank in (0, 1):
        assert (lower[:, rank] <= half_scores.gather(1, entry[:, rank])).all()


def test_the_window_is_narrow() -> None:
    """On normal data hardly a row has a second candidate: what makes the screen worth its while."""
    x, (book,) = hard("normal", rows=64, width=128, entries=256)
    best, lower, _ = screened(x, book)
    candidates = (lower[:, :2] <= best[:, None, None]).sum((1, 2))
    assert candidates.amin() == 1 and candidates.float().mean() < 1.3
    assert not (lower[:, 2] <= best[:, None]).any()


@pytest.mark.parametrize("shape", [(5, 7), (260, 65)])
def test_what_is_packed_is_bounded_rightly(shape: tuple[int, int]) -> None:
    from longcat_kernels.triton._pack import pack

    book = torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 3 + 5
    book[1, 2], book[2, 0] = torch.nan, 1e20
    layout = HalfLayout(*shape)
    packed = torch.full((layout.bytes,), 255, dtype=torch.uint8)
    pack(book, packed)
    form = {name: section.of(packed) for name, section in layout.sections().items()}
    bad, beyond = torch.arange(form["norm"].numel()) == 1, torch.arange(form["norm"].numel()) == 2
    bad[shape[0] :] = True
    tame = ~(bad | beyond)
    assert torch.equal(form["norm"].isinf(), bad) and torch.equal(form["half"].isinf(), ~tame)
    assert (form["words"][~tame] == 0).all() and (form["words"][:, shape[1] :] == 0).all()
    difference = book.double()[tame[: shape[0]]] - form["centre"].double()
    rounded = form["words"][tame][:, : shape[1]].double() * 2.0 ** -form["exponent"].item()
    assert (form["length"][tame] >= difference.norm(dim=1)).all()
    assert (form["error"][tame] >= (difference - rounded).norm(dim=1)).all()
    torch.testing.assert_close(form["half"][tame].double(), difference.square().sum(1) / 2, rtol=2.0**-23, atol=0)
    assert torch.equal(form["norm"][tame], spec._tree_sum(book.double()[tame[: shape[0]]].square()))
    assert 2**14 <= form["words"].abs().max() < 2**15
