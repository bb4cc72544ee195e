"""What products of groups of rows share: tiles and how they are chosen, the loop over K, weights through descriptors.

A tile of rows belongs to one group (expert). Its program adds up K in steps of `Tile.depth`, the same for every tile
shape of a dtype: which tile is chosen does not change the steps, and nothing else depends on the number of rows.

Dimension key
    E groups    M rows of a tile    N columns of a tile    K summed over
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton._numeric import INTERPRETED, round_to

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before triton 3.4
    TensorDescriptor = None

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16, and truncates to it
SHARED_BYTES = 99 * 1024  # for which tiles are cut without a device


class Tile(NamedTuple):
    """What one program computes, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    vectors: bool  # copies are of 16 bytes at a time; others are of an element, and never through descriptors

    def options(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tile_of(
    rows: int,
    groups: int,
    dtype: torch.dtype,
    shared_bytes: int,
    *,
    vectors: bool = True,
    wide: int = 128,
    parts: int = 1,
) -> Tile:
    """The tile for `rows` rows in all, evenly spread or not.

    Args:
        vectors: what `in_vectors` says of the matrices.
        wide: columns of the largest tile, of all `parts` together.
        parts: products of one program that share their rows.
    """
    average, depth = rows / groups, 128 // dtype.itemsize
    shapes = [(16, 64, 4), (64, 128 // parts, 4), (128, wide // parts, 8)]
    if dtype == torch.float32:  # three products of tensor cores for one
        shapes = [(16, 64, 4), (64, 64 // parts, 4), (64, 64 // parts, 4)]
    if not vectors:  # an address an element: more of them a thread do not fit the registers
        shapes = [(16, 64 // parts, 8), (64, 64 // parts, 8), (64, 64 // parts, 8)]
    height, columns, warps = shapes[0 if average <= 32 else 1 if average <= 256 else 2]
    stages = (shared_bytes - 2048) // ((height + parts * columns) * 128)
    most = 3 if warps == 8 and parts * columns < 256 else 4  # the larger tiles leave room for one another
    return Tile(height, columns, depth, warps, max(2, min(most, stages)), vectors)


def in_vectors(*tensors: Tensor) -> bool:
    """Whether kernels copy all of these 16 bytes at a time: Triton does where it knows that 16 divides addresses, sides
    and strides.

    Stacks of matrices may lie by columns too; a matrix that is no stack must lie by rows.
    """
    return all(_by_rows(t) or (t.ndim == 3 and _by_rows(t.mT)) for t in tensors)


def _by_rows(tensor: Tensor) -> bool:
    numbers = (tensor.data_ptr(), *tensor.shape[1:], *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(number % 16 == 0 for number in numbers)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may use."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return properties["max_shared_mem"]


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether copies through tensor descriptors (TMA) are there, and worth it."""
    if TensorDescriptor is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def describe(tensor: Tensor, block: list[int], tile: Tile) -> Any | None:
    """A descriptor of `tensor` that copies blocks, zero outside; None where there cannot be one."""
    if not tile.vectors:
        return None
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride > 0 for stride in strides)
    if not has_descriptors(tensor.device) or not aligned or tensor.stride(-1) != 1 or not tensor.numel():
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def weights_of(b_EKN: Tensor, tile: Tile) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """Arguments of a kernel that multiplies by b: it or its descriptor, strides, and the constants that say which."""
    inner = b_EKN.stride(1) == 1
    found = describe(b_EKN.mT, [1, tile.columns, tile.depth], tile) if inner else None
    if found is None:
        inner, found = False, describe(b_EKN, [1, tile.depth, tile.columns], tile)
    _, depth, columns = b_EKN.shape
    even = depth % tile.depth == 0 and columns % tile.columns == 0
    arguments = (b_EKN if found is None else found, *b_EKN.stride())
    return arguments, {"DESCRIBED": found is not None, "K_INNER": inner, "EVEN": even}


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """float32 values as TYPE, to the nearest."""
    if WIDEN:
        x = round_to(x, TYPE)
    return x.to(TYPE)


@triton.jit
def multiply_add(a_MK, b_KN, sum_MN):
    """sum + a @ b in float32; three products of tf32 stand for one of float32."""
    if WIDEN:
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, sum_MN, input_precision="tf32x3")


@triton.jit
def load_rows(a_ptr, at_M, k, K, column_stride, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """[M, K]: elements k.. of the rows that begin at `at`, zero from K on."""
    k_K = k + tl.arange(0, DEPTH)
    ptrs_MK = a_ptr + at_M[:, None] + k_K.to(tl.int64)[None, :] * column_stride
    return tl.load(ptrs_MK) if EVEN else tl.load(ptrs_MK, (k_K < K)[None, :] & (at_M >= 0)[:, None], other=0.0)


@triton.jit
def load_weights(
    b,  # descriptor, or pointer
    group,
    n,
    k,
    N,
    K,
    group_stride,
    k_stride,
    n_stride,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[K, N]: the block of b[group] from (k, n), zero outside of it."""
    if DESCRIBED:
        if K_INNER:
            return tl.reshape(b.load([group, n, k]), (COLUMNS, DEPTH)).T
        else:
            return tl.reshape(b.load([group, k, n]), (DEPTH, COLUMNS))
    else:
        n_N = n + tl.arange(0, COLUMNS)
        k_K = k + tl.arange(0, DEPTH)
        at_KN = k_K.to(tl.int64)[:, None] * k_stride + n_N.to(tl.int64)[None, :] * n_stride
        ptrs_KN = b + group.to(tl.int64) * group_stride + at_KN
        if EVEN:
            return tl.load(ptrs_KN)
        else:
            return tl.load(ptrs_KN, (k_K < K)[:, None] & (n_N < N)[None, :], other=0.0)


@triton.jit
def accumulate(
    a,  # rows by their places `at`, or a descriptor of them, from `first` on
    at_M,
    first,
    a_column,
    b,
    group,
    n,
    N,
    K,
    group_stride,
    k_stride,
    n_stride,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    A_DESCRIBED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[M, N] float32: rows of a times columns n.. of b[group]."""
    sum_MN = tl.zeros((at_M.shape[0], COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        a_MK = a.load([first, k]) if A_DESCRIBED else load_rows(a, at_M, k, K, a_column, DEPTH, EVEN)
        b_KN = load_weights(
            b, group, n, k, N, K, group_stride, k_stride, n_stride, COLUMNS, DEPTH, DESCRIBED, K_INNER, EVEN
        )
        sum_MN = multiply_add(a_MK, b_KN, sum_MN)
    return sum_MN


@triton.jit
def zero_kernel(out_ptr, rows_ptr, R, N, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the rows of out [R, N] from `rows` on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    past = (row >= tl.load(rows_ptr)) & (row < R)
    at = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    tl.store(out_ptr + at, tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty), past[:, None] & (column < N)[None, :])


def zero_tail(out_RN: Tensor, rows: Tensor) -> None:
    """Zeros in the rows of `out` from the number `rows` on, which is on the device."""
    (height, width), tile = out_RN.shape, (64, 128)
    if out_RN.numel():
        zero_kernel[(triton.cdiv(height, tile[0]), triton.cdiv(width, tile[1]))](
            out_RN, rows, height, width, *out_RN.stride(), ROWS=tile[0], COLUMNS=tile[1]
        )
