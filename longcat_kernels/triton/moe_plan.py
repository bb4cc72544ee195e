"""Routing plan: a counting sort of slots by expert, stable, without atomics and without a wait for the host.

Blocks of slots are counted, counts of earlier blocks are added up, and each block places its slots. Few slots make a
single block, which one launch does.

Dimension key
    T tokens    k slots of a token    E real experts    R slots, T * k    N tiles, at most
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import INTERPRETED, folds

BLOCK = 512  # slots
STEP = BLOCK if INTERPRETED else 32  # slots that a block compares its own with at a time
LANES = 64  # tiles, or numbers past the last, that are written at a time


@triton.jit
def _load_keys(ids_ptr, at, R, E):
    """int32 experts of slots, E where there is no real one."""
    id_ = tl.load(ids_ptr + at, at < R, other=-1)
    return tl.where((id_ >= 0) & (id_ < E), id_, E).to(tl.int32)


@triton.jit
def _narrow(sums):
    """Sums of int32 as int32: they are, but the interpreter of triton 3.2 stores them as int64."""
    return sums.to(tl.int64).to(tl.int32)


@triton.jit
def count_kernel(ids_ptr, before_ptr, R, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = _narrow(tl.histogram(_load_keys(ids_ptr, at, R, E), BINS))
    tl.store(before_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def scan_kernel(before_ptr, totals_ptr, blocks, BINS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Replaces the counts of each block by those of all blocks before it."""
    bin_W = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total_W = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, blocks, HEIGHT):
        block_H = first + tl.arange(0, HEIGHT)
        ptrs_HW = before_ptr + block_H[:, None] * BINS + bin_W[None, :]
        inside_HW = (block_H < blocks)[:, None] & (bin_W < BINS)[None, :]
        count_HW = tl.load(ptrs_HW, inside_HW, other=0)
        tl.store(ptrs_HW, total_W[None, :] + _narrow(tl.cumsum(count_HW, 0)) - count_HW, inside_HW)
        total_W += _narrow(tl.sum(count_HW, 0))
    tl.store(totals_ptr + bin_W, total_W)


@triton.jit
def write_tiles(tiles_ptr, start, count, N, TILE: tl.constexpr, LANES: tl.constexpr):
    """Tiles of this program's group, of groups with `count` rows from `start`; and its share of what is past the last.

    The group is the program's number; programs beyond the groups have that share only.
    """
    bin_ = tl.arange(0, start.shape[0])
    lane = tl.arange(0, LANES)
    group = tl.program_id(0)
    tiles = (count + TILE - 1) // TILE
    before = tl.sum(tl.where(bin_ < group, tiles, 0), 0)
    own = tl.sum(tl.where(bin_ == group, tiles, 0), 0)
    row = _narrow(tl.sum(tl.where(bin_ == group, start, 0), 0))
    for first in range(0, own, LANES):
        inside = (first + lane < own) & (before + first + lane < N)
        ptrs = tiles_ptr + 2 * (before + first + lane)
        tl.store(ptrs, tl.zeros_like(lane) + group, inside)
        tl.store(ptrs + 1, row + (first + lane) * TILE, inside)
    for first in range(2 * tl.sum(tiles, 0) + group * LANES, 2 * N, tl.num_programs(0) * LANES):
        tl.store(tiles_ptr + first + lane, tl.full((LANES,), -1, tl.int32), first + lane < 2 * N)


@triton.jit
def place_kernel(
    ids_ptr,  # [R] int64
    before_ptr,  # [blocks, BINS]: slots of each expert in earlier blocks; where they start, later
    totals_ptr,  # [BINS]
    counts_ptr,  # out [E]
    offsets_ptr,  # out [E + 1]
    tokens_ptr,  # out [R]
    slots_ptr,  # out [R]
    rows_ptr,  # out [R]
    tiles_ptr,  # out [N, 2]
    R,
    E,
    N,
    blocks,
    SLOTS,  # k
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    ALONE: tl.constexpr,  # there is one block: nothing has been counted
):
    block = tl.program_id(0)
    bin_ = tl.arange(0, BINS)
    own = _load_keys(ids_ptr, tl.arange(0, BLOCK), R, E)
    count = tl.where(bin_ < E, _narrow(tl.histogram(own, BINS)) if ALONE else tl.load(totals_ptr + bin_), 0)
    start = _narrow(tl.cumsum(count, 0)) - count
    rows = tl.sum(count, 0)
    write_tiles(tiles_ptr, start, count, N, TILE, LANES)
    if block == 0:
        tl.store(counts_ptr + bin_, count, bin_ < E)
        tl.store(offsets_ptr + bin_, start, bin_ <= E)
    if block < blocks:
        own_ptr = before_ptr + block * BINS
        if not ALONE:
            start += tl.load(own_ptr + bin_)
        tl.store(own_ptr + bin_, start)
        tl.debug_barrier()
        place = tl.arange(0, BLOCK)
        at = block * BLOCK + place
        key = _load_keys(ids_ptr, at, R, E)
        row = tl.load(own_ptr + key)
        for first in range(0, BLOCK, STEP):
            other = first + tl.arange(0, STEP)
            other_key = _load_keys(ids_ptr, block * BLOCK + other, R, E)
            earlier = (other_key[None, :] == key[:, None]) & (other[None, :] < place[:, None])
            row += _narrow(tl.sum(earlier.to(tl.int32), 1))
        real = (key < E) & (at < R)
        tl.store(rows_ptr + at, tl.where(real, row, -1), at < R)
        tl.store(slots_ptr + row, at, real)
        tl.store(tokens_ptr + row, at // SLOTS, real)
        past = (at >= rows) & (at < R)
        tl.store(slots_ptr + at, tl.full((BLOCK,), -1, tl.int32), past)
        tl.store(tokens_ptr + at, tl.full((BLOCK,), -1, tl.int32), past)


@triton.jit
def cut_kernel(ends_ptr, tiles_ptr, E, R, N, TILE: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr):
    """Tiles of groups that end at `ends`; what decreases or leaves [0, R] gives rows inside it nevertheless."""
    bin_ = tl.arange(0, BINS)
    end = tl.load(ends_ptr + bin_, bin_ < E, other=0)
    start = tl.load(ends_ptr + bin_ - 1, (bin_ > 0) & (bin_ < E), other=0)
    start, end = tl.minimum(tl.maximum(start, 0), R).to(tl.int32), tl.minimum(tl.maximum(end, 0), R).to(tl.int32)
    write_tiles(tiles_ptr, start, tl.maximum(end - start, 0), N, TILE, LANES)


def cut(ends_E: Tensor, rows: int, tile: int) -> Tensor:
    """[N, 2] int32: group and first row of each tile of groups that end at `ends`, then -1."""
    (groups,) = ends_E.shape
    tiles_N2 = ends_E.new_empty(groups + triton.cdiv(rows, tile), 2).int()
    cut_kernel[(groups,)](
        *(ends_E, tiles_N2, groups, rows, len(tiles_N2)),
        TILE=tile,
        BINS=1 << folds(groups + 1),
        LANES=LANES,
    )
    return tiles_N2


def run(
    ids_Tk: Tensor,
    n_real: int,
    tile: int,
    counts_E: Tensor,
    offsets: Tensor,
    tokens_R: Tensor,
    slots_R: Tensor,
    rows_Tk: Tensor,
    tiles_N2: Tensor,
) -> None:
    """Fills the outputs."""
    slots, bins = ids_Tk.numel(), 1 << folds(n_real + 1)
    blocks = triton.cdiv(slots, BLOCK)
    ids_R, before = ids_Tk.contiguous(), offsets.new_empty(max(1, blocks), bins)
    totals = offsets.new_empty(bins)
    with on(ids_Tk.device):
        if blocks > 1:
            count_kernel[(blocks,)](ids_R, before, slots, n_real, BINS=bins, BLOCK=BLOCK)
            scan_kernel[(triton.cdiv(bins, 16),)](before, totals, blocks, BINS=bins, HEIGHT=64, WIDTH=min(16, bins))
        place_kernel[(max(blocks, n_real),)](
            *(ids_R, before, totals, counts_E, offsets, tokens_R, slots_R, rows_Tk, tiles_N2),
            *(slots, n_real, len(tiles_N2), blocks, ids_Tk.shape[1]),
            TILE=tile,
            BINS=bins,
            BLOCK=BLOCK,
            STEP=STEP,
            LANES=LANES,
            ALONE=blocks <= 1,
            num_warps=8,
        )
