"""RVQ encode: two launches a level, no N x K memory, no synchronisation.

`start` rounds the rows and prepares them for the first level. Then, level by level, the screen (`_screen`, with the
proof) gives a few candidates per row, and `finish` scores those in float64 in the order of the definition, subtracts
the winner, and prepares the row for the next level. Last, `losses` adds up squares in a fixed order.

Dimension key
    N rows    D width    L levels    K entries    R, W rows and padded width of a program
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.layouts import HalfLayout
from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import (
    DTYPES,
    exponent_field,
    folds,
    padded,
    power_of_two,
    round_to,
    tile_rows,
    tree_sum,
    warps,
)
from longcat_kernels.triton._pack import pack
from longcat_kernels.triton._screen import (
    GROUP,
    INFINITE,
    Cut,
    accumulation,
    cut,
    half_exponent,
    row_bounds,
    screen_kernel,
    to_half,
)

LIMIT_FIELD: tl.constexpr = tl.constexpr(127 + 48)  # biased exponent of 2^48: rows beyond are scanned
BLOCK = 1024  # rows that a loss adds at a time
INTERPRETER = (4, 100_000)  # processors and bytes of shared memory for which tiles are cut without a device


@triton.jit
def _prepare(residual_RW, row_R, kept_R, centre_ptr, half_ptr, bounds_ptr, N, D, STRIDE, G: tl.constexpr):
    """Stores residuals for the screen: fp16(rho 2^a), and 2^-a, A, B, C; C is infinite where the screen cannot say."""
    column_W = tl.arange(0, residual_RW.shape[1])
    centre_W = tl.load(centre_ptr + column_W, column_W < D, other=0.0)
    wide_RW = residual_RW.to(tl.float64)
    rho_RW = wide_RW - centre_W[None, :].to(tl.float64)
    ordinary_R = kept_R & (tl.max(exponent_field(rho_RW.to(tl.float32)), 1) < LIMIT_FIELD)
    rho_RW = tl.where(ordinary_R[:, None], rho_RW, 0.0)
    exponent_R = half_exponent(tl.max(tl.abs(rho_RW.to(tl.float32)), 1))
    words_RW, lost_R, length_R = to_half(rho_RW, exponent_R[:, None])
    square_R = tl.sum(tl.where(ordinary_R[:, None], wide_RW * wide_RW, 0.0), 1)
    a_R, b_R, c_R = row_bounds(lost_R, length_R, square_R, G)
    c_R = tl.where(kept_R & (ordinary_R == 0), float("inf"), c_R)
    inside_R = row_R < N
    place_RW = row_R.to(tl.int64)[:, None] * STRIDE + column_W[None, :]
    tl.store(half_ptr + place_RW, words_RW, inside_R[:, None] & (column_W < STRIDE)[None, :])
    tl.store(bounds_ptr + row_R, power_of_two(-exponent_R).to(tl.float32), inside_R)
    tl.store(bounds_ptr + N + row_R, a_R, inside_R)
    tl.store(bounds_ptr + 2 * N + row_R, b_R, inside_R)
    tl.store(bounds_ptr + 3 * N + row_R, c_R, inside_R)


@triton.jit
def start_kernel(
    x_ptr,
    mask_ptr,  # [N] bytes; not read unless MASKED
    residual_ptr,
    total_ptr,
    centre_ptr,
    half_ptr,
    bounds_ptr,
    N,
    D,
    STRIDE,
    x_row,
    x_column,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.arange(0, WIDTH)
    kept_R = row_R < N
    inside_RW = kept_R[:, None] & (column_W < D)[None, :]
    if MASKED:
        kept_R = tl.load(mask_ptr + row_R, kept_R, other=0) != 0
    place_RW = row_R.to(tl.int64)[:, None] * x_row + column_W.to(tl.int64)[None, :] * x_column
    x_RW = tl.load(x_ptr + place_RW, inside_RW & kept_R[:, None], other=0.0)
    residual_RW = round_to(x_RW.to(tl.float32), RESIDUAL)
    at_RW = row_R.to(tl.int64)[:, None] * D + column_W[None, :]
    tl.store(residual_ptr + at_RW, residual_RW, inside_RW)
    tl.store(total_ptr + at_RW, tl.zeros_like(residual_RW), inside_RW)
    _prepare(residual_RW, row_R, kept_R, centre_ptr, half_ptr, bounds_ptr, N, D, STRIDE, G)


@triton.jit
def _candidates(found_ptr, row_R, K, TILE: tl.constexpr, TILES: tl.constexpr):
    """Of each row two candidates a tile [R, TILES] with their ranks (-1: none), how many, and whether some may miss."""
    tile = tl.arange(0, TILES)[None, :]
    tiles = K // TILE
    place = found_ptr + row_R.to(tl.int64)[:, None] * (4 * tiles) + tile
    best_R1 = tl.min(tl.load(place, tile < tiles, other=INFINITE), 1)[:, None] | (TILE - 1)
    first = tl.load(place + tiles, tile < tiles, other=INFINITE)
    second = tl.load(place + 2 * tiles, tile < tiles, other=INFINITE)
    third = tl.load(place + 3 * tiles, tile < tiles, other=INFINITE)
    near = ((first <= best_R1) & (first < INFINITE)).to(tl.int32)
    also = ((second <= best_R1) & (second < INFINITE)).to(tl.int32)
    missing_R = tl.max(((third <= best_R1) & (third < INFINITE)).to(tl.int32), 1) != 0
    near_R, also_R = tl.sum(near, 1), tl.sum(also, 1)
    rank = tl.where(near != 0, tl.cumsum(near, 1) - 1, -1)
    other_rank = tl.where(also != 0, near_R[:, None] + tl.cumsum(also, 1) - 1, -1)
    entry, other = tile * TILE + (first & (TILE - 1)), tile * TILE + (second & (TILE - 1))
    return entry, rank, other, other_rank, near_R + also_R, missing_R


@triton.jit(do_not_specialize=["level"])
def finish_kernel(
    residual_ptr,  # [N, D] float32, in and out
    total_ptr,  # [N, D] float32: codewords so far, in and out
    codes_ptr,  # [N, L] int64
    squares_ptr,  # [N, L] float64: |residual|^2
    mask_ptr,
    book_ptr,  # [K, D] float32
    norm_ptr,  # [K] float64
    found_ptr,  # what the screen found
    quantized_ptr,  # [N, D] of x's dtype: written after the last level
    centre_ptr,  # of the next level
    half_ptr,
    bounds_ptr,
    N,
    D,
    STRIDE,
    K,
    LEVELS,
    level,
    PADDED,  # K padded to 256
    TILE: tl.constexpr,  # of the screen
    TILES: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    MASKED: tl.constexpr,
    LAST: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < N
    kept_R = inside_R
    if MASKED:
        kept_R = tl.load(mask_ptr + row_R, inside_R, other=0) != 0
    column_1W = tl.arange(0, WIDTH)[None, :]
    inside_RW = inside_R[:, None] & (column_1W < D)
    at_RW = row_R.to(tl.int64)[:, None] * D + column_1W
    residual_RW = tl.load(residual_ptr + at_RW, inside_RW, other=0.0)
    good_R = kept_R & (tl.max(exponent_field(residual_RW), 1) < 255)
    read_R = tl.minimum(row_R, N - 1)
    entry, rank, other, other_rank, count_R, missing_R = _candidates(found_ptr, read_R, PADDED, TILE, TILES)
    scan_R = missing_R | (tl.load(bounds_ptr + 3 * N + read_R) == float("inf"))
    count_R = tl.where(good_R, tl.where(scan_R, K, count_R), 0)

    code_R = tl.zeros((ROWS,), tl.int32)
    least_R = tl.full((ROWS,), float("inf"), tl.float64)
    for turn in range(0, tl.max(count_R, 0)):
        picked = tl.where(rank == turn, entry, 0) + tl.where(other_rank == turn, other, 0)
        k_R = tl.where(scan_R, turn, tl.sum(picked, 1))
        norm_R = tl.load(norm_ptr + k_R, turn < count_R, other=float("inf"))
        usable_R = norm_R < float("inf")
        words_RW = tl.load(
            book_ptr + k_R.to(tl.int64)[:, None] * D + column_1W, usable_R[:, None] & (column_1W < D), other=0.0
        )
        dot_R = tree_sum(words_RW.to(tl.float64) * residual_RW.to(tl.float64), ROWS, WIDTH, FOLDS)
        score_R = tl.where(usable_R, norm_R - 2 * dot_R, float("inf"))
        better_R = (score_R < least_R) | ((score_R == least_R) & (k_R < code_R))
        code_R = tl.where(better_R & usable_R, k_R, code_R)
        least_R = tl.where(better_R & usable_R, score_R, least_R)

    chosen_RW = tl.load(
        book_ptr + code_R.to(tl.int64)[:, None] * D + column_1W, kept_R[:, None] & (column_1W < D), other=0.0
    )
    residual_RW = round_to(residual_RW - chosen_RW, RESIDUAL)
    total_RW = tl.load(total_ptr + at_RW, inside_RW, other=0.0) + chosen_RW
    tl.store(residual_ptr + at_RW, residual_RW, inside_RW)
    place_R = row_R.to(tl.int64) * LEVELS + level
    tl.store(codes_ptr + place_R, tl.where(kept_R, code_R, -1).to(tl.int64), inside_R)
    wide_RW = residual_RW.to(tl.float64)
    tl.store(squares_ptr + place_R, tl.sum(wide_RW * wide_RW, 1), inside_R)
    if LAST:
        tl.store(quantized_ptr + at_RW, round_to(total_RW, QUANTIZED).to(QUANTIZED), inside_RW)
    else:
        tl.store(total_ptr + at_RW, total_RW, inside_RW)
        _prepare(residual_RW, row_R, kept_R, centre_ptr, half_ptr, bounds_ptr, N, D, STRIDE, G)


@triton.jit
def losses_kernel(squares_ptr, mask_ptr, losses_ptr, N, D, LEVELS, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    level = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + row.to(tl.int64) * LEVELS + level, row < N, other=0.0)
        kept = (tl.load(mask_ptr + row, row < N, other=0) != 0) if MASKED else row < N
        count += kept.to(tl.int64)
    elements = tl.maximum(tl.sum(count, 0) * D, 1).to(tl.float64)
    tl.store(losses_ptr + level, (tl.sum(total, 0) / elements).to(tl.float32))


def run(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    residual_dtype: torch.dtype,
    quantized_TD: Tensor,
    residual_TD: Tensor,
    losses_L: Tensor,
    codes_TL: Tensor,
    *,
    tiles: Cut | None = None,
) -> None:
    """Fills the outputs; `tiles` replaces the choice of the screen's."""
    (rows, width), levels = x_TD.shape, len(codebooks)
    if not rows:
        losses_L.zero_()
        return
    new = functools.partial(torch.empty, device=x_TD.device)
    books = [book_KD.contiguous() for book_KD in codebooks]
    forms = _forms(books, packed)
    stride = forms[0]["words"].shape[1]
    half_TD, bounds_T = new(rows, stride, dtype=torch.float16), new(4, rows)
    squares_TL = new(rows, levels, dtype=torch.float64)
    total_TD = quantized_TD if quantized_TD.dtype == torch.float32 else torch.empty_like(residual_TD)
    kept_T = squares_TL if mask_T is None else mask_T.contiguous().view(torch.uint8)  # without a mask it is not read
    options = _options(width, stride, residual_dtype, mask_T is not None)
    grid = (triton.cdiv(rows, options["ROWS"]),)
    with on(x_TD.device):
        start_kernel[grid](
            *(x_TD, kept_T, residual_TD, total_TD, forms[0]["centre"], half_TD, bounds_T),
            *(rows, width, stride, *x_TD.stride()),
            **options,
        )
        for level, (book_KD, form) in enumerate(zip(books, forms, strict=True)):
            found, tile = _screen(half_TD, bounds_T, form, tiles)
            finish_kernel[grid](
                *(residual_TD, total_TD, codes_TL, squares_TL, kept_T, book_KD, form["norm"], found, quantized_TD),
                *(forms[min(level + 1, levels - 1)]["centre"], half_TD, bounds_T),
                *(rows, width, stride, book_KD.shape[0], levels, level, form["words"].shape[0]),
                TILE=tile,
                TILES=1 << folds(found.shape[2]),
                FOLDS=folds(options["WIDTH"]),
                QUANTIZED=DTYPES[quantized_TD.dtype],
                LAST=level == levels - 1,
                **options,
            )
        losses_kernel[(levels,)](
            *(squares_TL, kept_T, losses_L, rows, width, levels), MASKED=mask_T is not None, BLOCK=BLOCK, num_warps=4
        )


def _options(width: int, stride: int, residual_dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    """What `start_kernel` and `finish_kernel` are compiled for."""
    wide = padded(width)
    return {
        "G": accumulation(stride),
        "ROWS": tile_rows(wide),
        "WIDTH": wide,
        "RESIDUAL": DTYPES[residual_dtype],
        "MASKED": masked,
        "num_warps": warps(wide),
    }


def _forms(books: list[Tensor], packed: list[Tensor]) -> list[dict[str, Tensor]]:
    """The sections of each level's packed form; packs what came without one, a codebook of several levels once."""
    layouts = [HalfLayout(*book_KD.shape) for book_KD in books]
    given = [form.numel() for form in packed] == [layout.bytes for layout in layouts]
    made: dict[tuple[int, HalfLayout], Tensor] = {}
    forms = []
    for level, (book_KD, layout) in enumerate(zip(books, layouts, strict=True)):
        key = (book_KD.data_ptr(), layout)
        if not given and key not in made:
            made[key] = torch.empty(layout.bytes, dtype=torch.uint8, device=book_KD.device)
            pack(book_KD, made[key])
        form = packed[level] if given else made[key]
        forms.append({name: section.of(form) for name, section in layout.sections().items()})
    return forms


def _screen(half_TD: Tensor, bounds_T: Tensor, form: dict[str, Tensor], tiles: Cut | None) -> tuple[Tensor, int]:
    """What the screen finds [N, 4, K / tile], and that tile."""
    (rows, stride), entries = half_TD.shape, form["words"].shape[0]
    tiles = tiles or cut(rows, entries, *_device(half_TD.device))
    found = torch.empty(rows, 4, entries // tiles.entries, dtype=torch.int32, device=half_TD.device)
    screen_kernel[(triton.cdiv(rows, tiles.rows) * found.shape[2],)](
        *(half_TD, bounds_T, *(form[name] for name in ("words", "norm", "half", "length", "error", "exponent"))),
        *(found, rows, stride, entries),
        GROUP=GROUP,
        ROWS=tiles.rows,
        ENTRIES=tiles.entries,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return found, tiles.entries


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Processors, and bytes of shared memory that a program may use."""
    if device.type != "cuda":
        return INTERPRETER
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return properties["multiprocessor_count"], properties["max_shared_mem"]
