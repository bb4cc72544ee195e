"""Attention of `depth_decode`: one query a row over at most 32 cached levels.

Dimension key
    T rows    L levels    A heads    K key-value heads    C channels of a head, in two halves of H    R rows of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton._gemm import cast
from longcat_kernels.triton._numeric import DTYPES, INTERPRETED

ROWS = 64 if INTERPRETED else 1  # of a program; the interpreter has a price a program, not a row


@triton.jit
def _halves(at_R, inside_R, channels, HALF: tl.constexpr):
    """Both halves of heads at `at`, [R, H] float32."""
    c_H = tl.arange(0, HALF)
    first = (channels + 1) // 2
    a_RH = tl.load(at_R[:, None] + c_H[None, :], inside_R[:, None] & (c_H < first)[None, :], other=0.0)
    ptrs_RH = at_R[:, None] + (first + c_H)[None, :]
    b_RH = tl.load(ptrs_RH, inside_R[:, None] & (first + c_H < channels)[None, :], other=0.0)
    return a_RH, b_RH


@triton.jit
def _turned(
    a_RH,
    b_RH,
    norm_ptr,
    rope_ptr,
    level,
    levels,
    channels,
    eps,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """RMSNorm over the head, then rotary position."""
    c_H = tl.arange(0, HALF)
    first = (channels + 1) // 2
    if NORM:
        square_R = tl.sum(a_RH * a_RH + b_RH * b_RH, 1)
        inverse_R1 = (1.0 / tl.sqrt_rn(square_R / channels + eps))[:, None]
        norm_a_H = tl.load(norm_ptr + c_H, c_H < first, other=0.0).to(tl.float32)
        norm_b_H = tl.load(norm_ptr + first + c_H, first + c_H < channels, other=0.0).to(tl.float32)
        a_RH = a_RH * inverse_R1 * norm_a_H[None, :]
        b_RH = b_RH * inverse_R1 * norm_b_H[None, :]
    if ROPE:
        cos_H = tl.load(rope_ptr + level * first + c_H, c_H < first, other=0.0)[None, :]
        sin_H = tl.load(rope_ptr + (levels + level) * first + c_H, c_H < first, other=0.0)[None, :]
        a_RH, b_RH = a_RH * cos_H - b_RH * sin_H, b_RH * cos_H + a_RH * sin_H
    return a_RH, b_RH


@triton.jit
def _cached(at_R, inside_R, a_RH, b_RH, level, channels, LEVELS: tl.constexpr, HALF: tl.constexpr):
    """Appends a head to its cache, and gives all levels so far, [R, L, H] each half."""
    c_H = tl.arange(0, HALF)
    first = (channels + 1) // 2
    l_L = tl.arange(0, LEVELS)[None, :, None]
    ptrs_RLH = at_R[:, None, None] + l_L * channels + c_H[None, None, :]
    inside_a = inside_R[:, None] & (c_H < first)[None, :]
    inside_b = inside_R[:, None] & (first + c_H < channels)[None, :]
    all_a = tl.load(ptrs_RLH, inside_a[:, None, :] & (l_L < level), other=0.0)
    all_b = tl.load(ptrs_RLH + first, inside_b[:, None, :] & (l_L < level), other=0.0)
    own_ptrs = at_R[:, None] + level * channels + c_H[None, :]
    tl.store(own_ptrs, a_RH, inside_a)
    tl.store(own_ptrs + first, b_RH, inside_b)
    return tl.where(l_L == level, a_RH[:, None, :], all_a), tl.where(l_L == level, b_RH[:, None, :], all_b)


@triton.jit(do_not_specialize=["T", "level"])
def attention_kernel(
    qkv_ptr,  # [T, (A + 2 K) C] float32: queries, keys, values
    keys_ptr,  # [T, K, L, C] float32: those of the levels before; this level's are appended
    values_ptr,  # likewise
    q_norm_ptr,  # [C]; not read unless Q_NORM
    k_norm_ptr,  # [C]; not read unless K_NORM
    rope_ptr,  # [2, L, C / 2] float32; not read unless ROPE
    out_ptr,  # out [T, A C]
    T,
    level,
    levels,
    kv_heads,
    channels,
    scale,
    eps,
    GROUP: tl.constexpr,  # heads of a key-value head
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    HALF: tl.constexpr,
    TYPE: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside_R = row_R < T
    head = tl.program_id(1)
    heads = kv_heads * GROUP
    first = (channels + 1) // 2
    at_R = qkv_ptr + row_R * ((heads + 2 * kv_heads) * channels)
    c_H = tl.arange(0, HALF)

    k_a, k_b = _halves(at_R + (heads + head) * channels, inside_R, channels, HALF)
    k_a, k_b = _turned(k_a, k_b, k_norm_ptr, rope_ptr, level, levels, channels, eps, HALF, K_NORM, ROPE)
    v_a, v_b = _halves(at_R + (heads + kv_heads + head) * channels, inside_R, channels, HALF)
    past_R = (row_R * kv_heads + head) * (levels * channels)
    k_a, k_b = _cached(keys_ptr + past_R, inside_R, k_a, k_b, level, channels, LEVELS, HALF)
    v_a, v_b = _cached(values_ptr + past_R, inside_R, v_a, v_b, level, channels, LEVELS, HALF)

    for member in range(GROUP):
        query = head * GROUP + member
        q_a, q_b = _halves(at_R + query * channels, inside_R, channels, HALF)
        q_a, q_b = _turned(q_a, q_b, q_norm_ptr, rope_ptr, level, levels, channels, eps, HALF, Q_NORM, ROPE)
        score_RL = tl.sum(q_a[:, None, :] * k_a + q_b[:, None, :] * k_b, 2) * scale
        score_RL = tl.where((tl.arange(0, LEVELS) <= level)[None, :], score_RL, float("-inf"))
        weight_RL = tl.exp(score_RL - tl.max(score_RL, 1)[:, None])
        weight_RL = weight_RL / tl.sum(weight_RL, 1)[:, None]
        out_ptrs = out_ptr + (row_R * heads + query)[:, None] * channels + c_H[None, :]
        mixed_a = cast(tl.sum(weight_RL[:, :, None] * v_a, 1), TYPE)
        mixed_b = cast(tl.sum(weight_RL[:, :, None] * v_b, 1), TYPE)
        tl.store(out_ptrs, mixed_a, inside_R[:, None] & (c_H < first)[None, :])
        tl.store(out_ptrs + first, mixed_b, inside_R[:, None] & (first + c_H < channels)[None, :])


def attention(
    qkv_TN: Tensor,
    cache: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    rope: Tensor | None,
    out_TN: Tensor,
    level: int,
    eps: float,
) -> None:
    """out [T, A C], of the weights' dtype, from queries, keys and values; appends to cache [2, T, K, L, C]."""
    _, rows, kv_heads, levels, channels = cache.shape
    half = max(1, triton.next_power_of_2((channels + 1) // 2))
    attention_kernel[(triton.cdiv(rows, ROWS), kv_heads)](
        *(qkv_TN, *cache, *(qkv_TN if x is None else x for x in (q_norm_C, k_norm_C, rope)), out_TN),
        *(rows, level, levels, kv_heads, channels, channels**-0.5, eps),
        GROUP=out_TN.shape[1] // (kv_heads * channels),
        Q_NORM=q_norm_C is not None,
        K_NORM=k_norm_C is not None,
        ROPE=rope is not None,
        ROWS=ROWS,
        LEVELS=triton.next_power_of_2(levels),
        HALF=half,
        TYPE=DTYPES[out_TN.dtype],
        num_warps=2,
    )
