"""Fills a `HalfLayout` buffer from codewords, on their device.

The centre is the mean, column by column, of the elements below 2^47; any centre would give the same codes, this one the
shortest `length`. "Tame" codewords are those whose elements all are below that, hence |c - m| < 2^48 as the screen
asks; usable ones that are not tame have finite `norm`, infinite `half`, and the screen always keeps them.

Dimension key
    D width    K entries    R rows of a tile    W width of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.layouts import HalfLayout
from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import exponent_field, folds, padded, tile_rows, tree_sum, warps
from longcat_kernels.triton._screen import half_exponent, to_half

COLUMNS = 32  # of a program of the centre
LIMIT_FIELD: tl.constexpr = tl.constexpr(127 + 47)


@triton.jit
def centre_kernel(book_ptr, centre_ptr, spread_ptr, K, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The centre of COLUMNS columns and the largest distance from it there, of elements below the limit."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    least = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    most = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for first in range(0, K, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < K)[:, None] & (column < D)[None, :]
        value = tl.load(book_ptr + row.to(tl.int64)[:, None] * D + column[None, :], inside, other=float("inf"))
        tame = exponent_field(value) < LIMIT_FIELD
        total += tl.where(tame, value, 0.0).to(tl.float64)
        count += tame.to(tl.int32)
        least = tl.minimum(least, tl.where(tame, value, float("inf")))
        most = tl.maximum(most, tl.where(tame, value, float("-inf")))
    found = tl.sum(count, 0)
    centre = (tl.sum(total, 0) / tl.maximum(found, 1)).to(tl.float32)
    tl.store(centre_ptr + column, centre, column < D)
    spread = tl.maximum(tl.max(most, 0) - centre, centre - tl.min(least, 0))
    tl.store(spread_ptr + tl.program_id(0), tl.max(tl.where(found > 0, spread, 0.0), 0))


@triton.jit
def pack_kernel(
    book_ptr,
    spread_ptr,
    words_ptr,
    norm_ptr,
    half_ptr,
    length_ptr,
    error_ptr,
    centre_ptr,
    exponent_ptr,
    K,
    D,
    STRIDE,  # D padded to 64
    SPREADS,
    SPREADS_W: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDS: tl.constexpr,
):
    """ROWS codewords; those past the last entry are padding."""
    spread = tl.arange(0, SPREADS_W)
    exponent = half_exponent(tl.max(tl.load(spread_ptr + spread, spread < SPREADS, other=0.0), 0))
    if tl.program_id(0) == 0:
        tl.store(exponent_ptr, exponent)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < K)[:, None] & (column < D)[None, :]
    value = tl.load(book_ptr + row.to(tl.int64)[:, None] * D + column[None, :], inside, other=0.0)
    field = tl.max(exponent_field(value), 1)
    usable = (row < K) & (field < 255)
    tame = usable & (field < LIMIT_FIELD)
    wide = tl.where(usable[:, None], value, 0.0).to(tl.float64)
    norm = tree_sum(wide * wide, ROWS, WIDTH, FOLDS)
    centre = tl.load(centre_ptr + column, column < D, other=0.0).to(tl.float64)
    difference = tl.where(tame[:, None] & inside, wide - centre[None, :], 0.0)
    square = tl.sum(difference * difference, 1)
    words, lost, kept = to_half(difference, exponent)
    error = (lost + (lost + kept) * 2.0**-50) * (1 + 2.0**-20)
    length = tl.sqrt(square) * (1 + 2.0**-20)
    beyond = tl.where(usable, float("inf"), 0.0)
    tl.store(words_ptr + row.to(tl.int64)[:, None] * STRIDE + column[None, :], words, (column < STRIDE)[None, :])
    tl.store(norm_ptr + row, tl.where(usable, norm, float("inf")))
    tl.store(half_ptr + row, tl.where(tame, (square * 0.5).to(tl.float32), float("inf")))
    tl.store(length_ptr + row, tl.where(tame, tl.maximum(length, 2.0**-100).to(tl.float32), beyond))
    tl.store(error_ptr + row, tl.where(tame, tl.maximum(error, 2.0**-100).to(tl.float32), beyond))


def pack(words_KD: Tensor, packed: Tensor) -> None:
    """Fills `packed`, uint8 of `HalfLayout(K, D).bytes`, from float32 codewords; two launches, no synchronisation."""
    entries, dim = words_KD.shape
    words_KD = words_KD.contiguous()
    form = {name: section.of(packed) for name, section in HalfLayout(entries, dim).sections().items()}
    programs = triton.cdiv(dim, COLUMNS)
    spread = torch.empty(programs, dtype=torch.float32, device=words_KD.device)
    rows, stride = form["words"].shape
    width = padded(dim)
    tile = tile_rows(width)
    with on(words_KD.device):
        centre_kernel[(programs,)](
            words_KD, form["centre"], spread, entries, dim, ROWS=128, COLUMNS=COLUMNS, num_warps=8
        )
        pack_kernel[(rows // tile,)](
            words_KD,
            spread,
            *(form[name] for name in ("words", "norm", "half", "length", "error", "centre", "exponent")),
            entries,
            dim,
            stride,
            programs,
            SPREADS_W=1 << folds(programs),
            ROWS=tile,
            WIDTH=width,
            FOLDS=folds(width),
            num_warps=warps(width),
        )
