"""RVQ decode: the sum of codewords, eight levels a launch.

Dimension key
    T rows    D width    L levels    K entries    R, W rows and width of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import padded

AT_ONCE = 8  # levels of a launch: each codebook is an argument of its own


@triton.jit
def of_level(LEVEL: tl.constexpr, of0, of1, of2, of3, of4, of5, of6, of7):
    """That of the arguments which belongs to a level: Triton 3.2 has no tuples."""
    if LEVEL == 0:
        chosen = of0
    elif LEVEL == 1:
        chosen = of1
    elif LEVEL == 2:
        chosen = of2
    elif LEVEL == 3:
        chosen = of3
    elif LEVEL == 4:
        chosen = of4
    elif LEVEL == 5:
        chosen = of5
    elif LEVEL == 6:
        chosen = of6
    elif LEVEL == 7:
        chosen = of7
    return chosen


@triton.jit
def codeword(book_ptr, entries, codes_ptr, row_R, T, column_W, D, row_stride, level_stride, LEVEL: tl.constexpr):
    """[R, W] float32: the codewords of one level; zero where the code is negative, NaN where there is no such entry."""
    code_R = tl.load(codes_ptr + row_R.to(tl.int64) * row_stride + LEVEL * level_stride, row_R < T, other=-1)
    there_R = (code_R >= 0) & (code_R < entries)
    place_RW = code_R[:, None] * D + column_W[None, :]
    word_RW = tl.load(book_ptr + place_RW, there_R[:, None] & (column_W < D)[None, :], other=0.0)
    return tl.where((code_R < entries)[:, None], word_RW, float("nan"))


@triton.jit
def decode_kernel(
    codes_ptr,  # [T, L] int64, any strides
    out_ptr,  # [T, D] float32: the sum of the levels before, in and out
    book0_ptr,
    book1_ptr,
    book2_ptr,
    book3_ptr,
    book4_ptr,
    book5_ptr,
    book6_ptr,
    book7_ptr,
    entries0,
    entries1,
    entries2,
    entries3,
    entries4,
    entries5,
    entries6,
    entries7,
    T,
    D,
    row_stride,
    level_stride,
    LEVELS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_RW = (row_R < T)[:, None] & (column_W < D)[None, :]
    at_RW = row_R.to(tl.int64)[:, None] * D + column_W[None, :]
    sum_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    if not FIRST:
        sum_RW = tl.load(out_ptr + at_RW, inside_RW, other=0.0)
    for level in tl.static_range(LEVELS):
        book_ptr = of_level(
            level, book0_ptr, book1_ptr, book2_ptr, book3_ptr, book4_ptr, book5_ptr, book6_ptr, book7_ptr
        )
        entries = of_level(level, entries0, entries1, entries2, entries3, entries4, entries5, entries6, entries7)
        sum_RW += codeword(book_ptr, entries, codes_ptr, row_R, T, column_W, D, row_stride, level_stride, level)
    tl.store(out_ptr + at_RW, sum_RW, inside_RW)


def groups(codebooks: list[Tensor]) -> list[tuple[int, int, list[Tensor], list[int]]]:
    """Levels of a launch: the first, how many, and AT_ONCE codebooks with their entries, the last one repeated."""
    found = []
    for first in range(0, len(codebooks), AT_ONCE):
        books = [book_KD.contiguous() for book_KD in codebooks[first : first + AT_ONCE]]
        filled = books + books[-1:] * (AT_ONCE - len(books))
        found.append((first, len(books), filled, [book_KD.shape[0] for book_KD in filled]))
    return found


def tile(width: int) -> tuple[int, int]:
    """Rows and width of the tile of an elementwise kernel."""
    columns = min(1024, padded(width))
    return max(1, 1024 // columns), columns


def run(codes_TL: Tensor, codebooks: list[Tensor], out_TD: Tensor) -> None:
    """Fills `out_TD`; a code beyond the codebook gives a row of NaN."""
    count, width = out_TD.shape
    rows, columns = tile(width)
    with on(out_TD.device):
        for first, levels, books, entries in groups(codebooks) if count else ():
            decode_kernel[(triton.cdiv(count, rows), triton.cdiv(width, columns))](
                *(codes_TL[:, first:], out_TD, *books, *entries, count, width, *codes_TL.stride()),
                LEVELS=levels,
                FIRST=first == 0,
                ROWS=rows,
                WIDTH=columns,
                num_warps=4,
            )
