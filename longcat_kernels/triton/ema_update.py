"""EMA codebook update: rows are sorted by code, `plan` moves the counts, one pass over the codebook does the rest.

Everything stays on the device. Sums, products and quotients are float64 and are not fused, so that they have the bits
of the definition; only the sum of the counts may have another order.

Dimension key
    N rows    D width    K entries
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.layouts import HalfLayout
from longcat_kernels.triton import on
from longcat_kernels.triton._numeric import padded
from longcat_kernels.triton._pack import pack
from longcat_kernels.triton._segments import segment_sum, segments

BLOCK = 1024  # of rows, entries or columns


@triton.jit
def _mix(x):
    """A bijection of uint32, that of `reference.ema_update`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["low", "high"])
def keys_kernel(codes_ptr, keys_ptr, N, stride, low, high, BLOCK: tl.constexpr):
    """What rows are sorted by to restart entries; those without a code come last."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(codes_ptr + row.to(tl.int64) * stride, row < N, other=-1) >= 0
    zero = tl.zeros_like(row).to(tl.uint32)
    seed = _mix(_mix(zero + low.to(tl.uint32)) ^ high.to(tl.uint32) ^ 0x9E3779B9)
    mixed = _mix(_mix(row.to(tl.uint32)) ^ seed).to(tl.int64)
    tl.store(keys_ptr + row, tl.where(used, mixed, row.to(tl.int64) + (1 << 32)), row < N)


@triton.jit
def _float64(bits):
    """A float64 argument, which Triton would round to float32, from its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["decay", "eps", "threshold", "fraction", "count"])
def plan_kernel(
    sizes_ptr,  # [K] float32, in and out
    starts_ptr,  # [K + 1] int64
    rows_ptr,  # [N] int64: rows in the order in which entries restart from them
    inverses_ptr,  # out [K] float64: one over the smoothed counts, 0 where these are not positive
    chosen_ptr,  # out [K] int64: the row that an entry restarts from, or -1
    count_ptr,  # out [1] float64: the moving count of a restarted entry
    restarted_ptr,  # out [] int64
    N,
    K,
    decay,  # this and what follows: bits of a float64
    eps,
    threshold,
    fraction,
    count,
    RESTART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    keep = _float64(decay)
    smooth = _float64(eps)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, K, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        start = tl.load(starts_ptr + entry, entry < K, other=0)
        end = tl.load(starts_ptr + entry + 1, entry < K, other=0)
        size = tl.load(sizes_ptr + entry, entry < K, other=0.0).to(tl.float64)
        size = (keep * size + (1 - keep) * (end - start).to(tl.float64)).to(tl.float32)
        tl.store(sizes_ptr + entry, size, entry < K)
        sums += size.to(tl.float64)
    tl.debug_barrier()

    total = tl.sum(sums, 0)
    mean = total / K
    relative = _float64(fraction) * mean
    least = tl.where(relative <= _float64(threshold), _float64(threshold), relative)  # NaN: none restarts
    new = _float64(count)
    new = tl.where(new == 0, mean.to(tl.float32).to(tl.float64), new)
    tl.store(count_ptr, new)
    usable = N - tl.load(starts_ptr)
    least = tl.where(usable > 0, least, float("-inf"))
    restarted = usable * 0
    for first in range(0, K, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        size = tl.load(sizes_ptr + entry, entry < K, other=float("inf"))
        wide = size.to(tl.float64)
        smoothed = total * (wide + smooth) / (total + K * smooth)
        inverse = tl.where(smoothed > 0, 1 / tl.where(smoothed > 0, smoothed, 1.0), 0.0)
        tl.store(inverses_ptr + entry, inverse, entry < K)
        if RESTART:
            dead = (wide < least) & (entry < K)
            rank = restarted + tl.cumsum(dead.to(tl.int64), 0) - 1
            row = tl.load(rows_ptr + rank % tl.maximum(usable, 1), dead, other=-1)
            tl.store(chosen_ptr + entry, row, entry < K)
            tl.store(sizes_ptr + entry, tl.where(dead, new.to(tl.float32), size), entry < K)
            restarted += tl.sum(dead.to(tl.int64), 0)
        else:
            tl.store(chosen_ptr + entry, tl.full((BLOCK,), -1, tl.int64), entry < K)
    tl.store(restarted_ptr, restarted)


@triton.jit(do_not_specialize=["decay"])
def update_kernel(
    embed_ptr,  # [K, D] float32, in and out
    moving_ptr,  # [K, D] float32, in and out
    vectors_ptr,
    order_ptr,  # [N] int64: rows grouped by code
    starts_ptr,
    inverses_ptr,  # what `plan_kernel` wrote
    chosen_ptr,
    count_ptr,
    D,
    row_stride,
    column_stride,
    decay,
    WIDTH: tl.constexpr,
):
    entry = tl.program_id(0)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_W = column_W < D
    place_W = column_W.to(tl.int64) * column_stride
    start = tl.load(starts_ptr + entry)
    end = tl.load(starts_ptr + entry + 1)
    sum_W = segment_sum(vectors_ptr, order_ptr, start, end, row_stride, place_W, inside_W, WIDTH, tl.float64)
    at_W = entry.to(tl.int64) * D + column_W
    keep = _float64(decay)
    moving_W = tl.load(moving_ptr + at_W, inside_W, other=0.0).to(tl.float64)
    moving_W = (keep * moving_W + (1 - keep) * sum_W).to(tl.float32)
    inverse = tl.load(inverses_ptr + entry)
    word_W = tl.load(embed_ptr + at_W, inside_W, other=0.0)
    if inverse > 0:
        word_W = (moving_W.to(tl.float64) * inverse).to(tl.float32)
    row = tl.load(chosen_ptr + entry)
    if row >= 0:
        word_W = tl.load(vectors_ptr + row * row_stride + place_W, inside_W, other=0.0).to(tl.float32)
        moving_W = (word_W.to(tl.float64) * tl.load(count_ptr)).to(tl.float32)
    tl.store(embed_ptr + at_W, word_W, inside_W)
    tl.store(moving_ptr + at_W, moving_W, inside_W)


def why_not(*inputs: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    embed_KD, packed = inputs[0], inputs[3]
    if packed is not None and packed.numel() != HalfLayout(*embed_KD.shape).bytes:
        return "needs a codebook prepared for a GPU"
    contiguous = all(tensor.is_contiguous() for tensor in inputs[:3])
    return None if contiguous else "needs a contiguous codebook and statistics"


def run(
    embed_KD: Tensor,
    embed_ema_KD: Tensor,
    cluster_size_ema_K: Tensor,
    packed: Tensor | None,
    vectors_ND: Tensor,
    codes_N: Tensor,
    decay: float,
    eps: float,
    restart_threshold: float,
    restart_fraction: float,
    restart_count: float,
    seed: int,
    restarted: Tensor,
) -> None:
    """Writes the first three, `packed` where it is given, and `restarted`."""
    (entries, dim), rows, device = embed_KD.shape, codes_N.shape[0], embed_KD.device
    restart = restart_threshold > 0 or restart_fraction > 0
    width = min(BLOCK, padded(dim))
    with on(device):
        order_N, starts = segments(codes_N, entries)
        rows_N = _restart_rows(codes_N, seed) if restart and rows else order_N
        inverses_K = torch.empty(entries, dtype=torch.float64, device=device)
        chosen_K, count = torch.empty_like(starts[1:]), torch.empty_like(inverses_K[:1])
        plan_kernel[(1,)](
            *(cluster_size_ema_K, starts, rows_N, inverses_K, chosen_K, count, restarted, rows, entries),
            *map(_bits, (decay, eps, restart_threshold, restart_fraction, restart_count)),
            RESTART=restart,
            BLOCK=min(4096, padded(entries)),
            num_warps=8,
            enable_fp_fusion=False,
        )
        update_kernel[(entries, triton.cdiv(dim, width))](
            *(embed_KD, embed_ema_KD, vectors_ND, order_N, starts, inverses_K, chosen_K, count),
            *(dim, *vectors_ND.stride(), _bits(decay)),
            WIDTH=width,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if packed is not None:
        pack(embed_KD, packed)


def _restart_rows(codes_N: Tensor, seed: int) -> Tensor:
    """Row numbers in the order of `reference.ema_update.restart_rows`, then those without a code."""
    keys_N = torch.empty_like(codes_N, memory_format=torch.contiguous_format)
    keys_kernel[(triton.cdiv(codes_N.numel(), BLOCK),)](
        codes_N, keys_N, codes_N.numel(), codes_N.stride(0), seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, BLOCK=BLOCK
    )
    return keys_N.argsort()


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
