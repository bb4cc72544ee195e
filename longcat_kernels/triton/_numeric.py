"""What kernels share: the sum whose order is defined, rounding to a dtype, and powers of two.

Dimension key
    R rows of a tile    W width of a tile, a power of two
"""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tree_sum(terms_RW, ROWS: tl.constexpr, WIDTH: tl.constexpr, FOLDS: tl.constexpr):
    """[ROWS, 2^FOLDS] -> [ROWS]: adds the second half to the first until one is left, as `reference._tree_sum` does.

    The compiler is free to order a sum, but a sum of two has one order.
    """
    for fold in tl.static_range(FOLDS):
        terms_RW = tl.sum(tl.reshape(terms_RW, (ROWS, 2, WIDTH >> (fold + 1))), 1)
    return tl.reshape(terms_RW, (ROWS,))


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 values rounded to the nearest of DTYPE, ties to even, still float32.

    bfloat16 by integers: the interpreter's own cast truncates.
    """
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    elif tl.float16 == DTYPE:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def power_of_two(exponent):
    """2^exponent, float64, of int32 in [-1022, 1023]."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_field(x):
    """The biased exponent of float32 values: 255 for NaN and infinity, e + 127 for 2^e <= |x| < 2^(e + 1)."""
    return (x.to(tl.int32, bitcast=True) >> 23) & 255


def folds(width: int) -> int:
    """log2 of the power of two that `width` is padded to."""
    return (width - 1).bit_length()


def padded(width: int) -> int:
    """The power of two that kernels pad `width` to."""
    return max(64, 1 << folds(width))


def tile_rows(width: int) -> int:
    """Rows of a program that holds whole rows of padded `width`; the interpreter has a price a program, not a row."""
    return max(1, min(256, 65536 // width) if INTERPRETED else min(4, 2048 // width))


def warps(width: int) -> int:
    """Warps of a program that holds whole rows of padded `width`."""
    return max(4, min(16, width // 512))


INTERPRETED = not isinstance(tree_sum, triton.JITFunction)
