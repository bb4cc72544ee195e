"""The screen of `rvq_encode`: float16 products of a level find, per row, the few codewords that may be nearest.

What decides between codewords c of row r is S = |c|^2 - 2 r.c, float64, in the order of the definition. With m the
codebook's centre, d = c - m and rho = r - m, take T = |d|^2 / 2 - rho.d, real numbers: |c|^2 / 2 - r.c differs from
it by k = r.m - |m|^2 / 2, the same for all codewords. Products of float32 being exact, S rounds F + 1 times for a
width of 2^F <= 2^20, and so

    |S / 2 + k - T| <= 12 2^-53 (2 |c|^2 + |r|^2) <= 2^-48 (|c|^2 + |r|^2).                                          (1)

Tensor cores multiply rho^ = fp16(rho 2^a) 2^-a and d^ = fp16(d 2^e) 2^-e. They do not add as IEEE floats do, but
align and truncate: their sum p of n products is taken to err by g |rho^| |d^|, g = 4 n 2^-24, four times the bound of
a float32 sum in any order. Let E >= |rho - rho^|, L >= |rho^|, `error` >= |d - d^|, `length` >= |d|. By
Cauchy-Schwarz

    |rho.d - p| <= E length + L error + g L (length + error) = (E + g L) length + (1 + g) L error.                   (2)

S / 2 + k is therefore at least `lower`, where with G = g + 2^-19

    lower = h (1 - 2^-20) - 2^-47 |c|^2 - p - width,    h = |d|^2 / 2,    width = C + A length + B error,
    A = (1 + 2^-18) (E + G L),    B = (1 + 2^-18) (1 + G) L,    C = 2^-47 |r|^2 + 2^-110,

if what the coefficients have beyond (1) and (2) covers rounding, u = 2^-24 each. `lower` is evaluated in float32: h
is rounded when stored, times its coefficient, and in three subtractions, 5 u h; p, whose scaling by 2^-(a + e) is
exact, in two, 2 u |p|; products, sums, A, B, C and a subtraction round width, 5 u. The `upper` of the same codeword
is `lower` plus 2^-19 h + 2^-46 |c|^2 + 2 width: up to three roundings more of what is there, and 10 u of twice width.
In all less than 10 u h, 3 u |p| and 17 u width, where 2^-20 h = 16 u h, 2^-19 L (length + error) >= 31 u |p| and
2^-18 width = 64 u width are there to cover them; the terms of |c|^2 and |r|^2 are twice those of (1). Lengths are
measured in float64 and rounded up. What is below float32's normal range, flushed to zero or not, errs by less than
2^-126, a dozen times: 2^-110 in C. A, B, `length` and `error` are kept at 2^-100 or more, so that they are normal
themselves.

Each tile of entries gives the `upper` of the codeword whose `lower` is least there. U, the least of these, is at
least the least S / 2 + k; the nearest codeword has lower <= S / 2 + k <= U, so that one with lower > U can neither
win nor tie. Each tile also gives its three least `lower`, the first two as candidates; where the third is <= U one
may be missing, and the row is scanned in float64 instead. A `lower` is kept as an integer that orders as it does,
with the entry's place in the tile for last bits: rounded down, it is a bound still; `upper` starts from it rounded
up.

All this holds for |rho|, |d| < 2^48 elementwise: nothing overflows (2^96 D < 2^117), and 2^-a, 2^-e, 2^-(a + e) are
normal. Codewords beyond have lower = -infinity, upper = infinity: always candidates. Rows beyond have C = infinity:
always scanned. What is tiny needs no care: exponents stop at 60, and E and `error` are measured, not assumed.

Dimension key
    N rows    D width, padded to 64    K entries, padded to 256
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from longcat_kernels.triton._numeric import exponent_field, power_of_two

GROUP = 16  # blocks of rows that go through the tiles of entries together, so that both stay in the L2 cache
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # the key of infinity


@dataclass(frozen=True)
class Cut:
    """What one program of the screen takes, and how it is compiled."""

    rows: int
    entries: int
    warps: int
    stages: int
    depth: int = 64


def cut(rows: int, entries: int, processors: int, shared_bytes: int) -> Cut:
    """The largest tile of which there are as many as processors, for `entries` padded to 256."""
    shapes = [(64, 64, 4)] if rows > 16 else [(16, 64, 4)]
    if rows > 64:
        shapes = [(128, 128, 8), *shapes]
    filling = [shape for shape in shapes if -(-rows // shape[0]) * (entries // shape[1]) >= processors]
    tile_rows, tile_entries, warps = (filling or shapes[-1:])[0]
    stages = (shared_bytes - 4096) // ((tile_rows + tile_entries) * 128)  # of tiles that are 64 float16 deep
    return Cut(tile_rows, tile_entries, warps, max(2, min(4, stages)))


def accumulation(width: int) -> float:
    """G of the proof, for products of `width` terms."""
    return 4 * width * 2.0**-24 + 2.0**-19


@triton.jit
def half_exponent(largest):
    """The exponent that brings float32 `largest` below 2^48 into [2^14, 2^15); at most 60."""
    return tl.minimum(14 + 127 - exponent_field(largest), 60)


@triton.jit
def to_half(values, exponent):
    """fp16(values 2^exponent), and the lengths along the last axis of what it rounds away and of what it keeps."""
    words = (values * power_of_two(exponent)).to(tl.float32).to(tl.float16)
    kept = words.to(tl.float32).to(tl.float64) * power_of_two(-exponent)
    lost = values - kept
    return words, tl.sqrt(tl.sum(lost * lost, 1)), tl.sqrt(tl.sum(kept * kept, 1))


@triton.jit
def row_bounds(lost, kept, square, G: tl.constexpr):
    """A, B and C of the proof from |rho - rho^|, |rho^| and |r|^2, float64."""
    a = tl.maximum((lost + G * kept) * (1 + 2.0**-18), 2.0**-100)
    b = tl.maximum(kept * (1 + G) * (1 + 2.0**-18), 2.0**-100)
    return a.to(tl.float32), b.to(tl.float32), (square * 2.0**-47 + 2.0**-110).to(tl.float32)


@triton.jit
def _entry_bounds(norm_ptr, half_ptr, length_ptr, error_ptr, entry):
    """What of lower and upper depends on the codeword alone, and its length and error; see the proof's end."""
    norm = tl.load(norm_ptr + entry)
    half = tl.load(half_ptr + entry)
    tame = half < float("inf")
    slack = tl.where(tame, norm * 2.0**-47, 0.0).to(tl.float32)
    beyond = tl.where(norm < float("inf"), float("-inf"), float("inf"))
    low = tl.where(tame, half * (1 - 2.0**-20) - slack, beyond)
    rise = tl.where(tame, half * 2.0**-19, 0.0) + 2 * slack
    length = tl.where(tame, tl.load(length_ptr + entry), 0.0)
    return low, rise, length, tl.where(tame, tl.load(error_ptr + entry), 0.0)


@triton.jit
def key_of(value):
    """int32 that order as float32 values do."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 value that `key_of` maps to `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def screen_kernel(
    rows_ptr,  # [N, D] float16, rho^ 2^a
    bounds_ptr,  # [4, N] float32: 2^-a, A, B, C
    words_ptr,  # the codebook's HalfLayout: [K, D] float16, d^ 2^e
    norm_ptr,
    half_ptr,
    length_ptr,
    error_ptr,
    exponent_ptr,
    found_ptr,  # out [N, 4, K / ENTRIES] int32: keys of the least upper bound and of the three least lower bounds
    N,
    D,
    K,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = K // ENTRIES
    group = tl.program_id(0) // (GROUP * tiles)
    members = tl.minimum(GROUP, tl.cdiv(N, ROWS) - group * GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    tile = within // members
    row = (group * GROUP + within % members) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, N - 1)
    column = tl.arange(0, ENTRIES)
    entry = tile * ENTRIES + column
    depth = tl.arange(0, DEPTH)
    row_ptrs = rows_ptr + read.to(tl.int64)[:, None] * D + depth[None, :]
    word_ptrs = words_ptr + entry.to(tl.int64)[None, :] * D + depth[:, None]
    dot = tl.zeros((ROWS, ENTRIES), tl.float32)
    for d in range(0, D, DEPTH):
        dot = tl.dot(tl.load(row_ptrs + d), tl.load(word_ptrs + d), dot)

    scale = tl.load(bounds_ptr + read) * power_of_two(-tl.load(exponent_ptr)).to(tl.float32)
    by_length = tl.load(bounds_ptr + N + read)
    by_error = tl.load(bounds_ptr + 2 * N + read)
    constant = tl.load(bounds_ptr + 3 * N + read)
    constant = tl.where(constant < float("inf"), constant, 0.0)
    low, _, length, error = _entry_bounds(norm_ptr, half_ptr, length_ptr, error_ptr, entry)
    lower = low[None, :] - dot * scale[:, None]
    lower -= constant[:, None] + by_length[:, None] * length[None, :] + by_error[:, None] * error[None, :]
    key = (key_of(lower) & -ENTRIES) | column[None, :]
    place = found_ptr + row.to(tl.int64) * (4 * tiles) + tile
    for rank in tl.static_range(1, 4):
        least = tl.min(key, 1)
        tl.store(place + rank * tiles, least, row < N)
        if rank == 1:
            nearest = tile * ENTRIES + (least & (ENTRIES - 1))
            low, rise, length, error = _entry_bounds(norm_ptr, half_ptr, length_ptr, error_ptr, nearest)
            width = constant + by_length * length + by_error * error
            upper = value_of(tl.minimum(least | (ENTRIES - 1), INFINITE)) + (rise + 2 * width)
            tl.store(place, tl.where(low > float("-inf"), key_of(upper), INFINITE), row < N)
        key = tl.where(key == least[:, None], 0x7FFFFFFF, key)
