"""What the kernels of `depth_decode`'s sampler share: numbers of a row, its guided logits, what is kept of them.

Dimension key
    T rows    V classes    B blocks of classes    R rows of a tile    W classes of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from longcat_kernels.triton._screen import key_of

# Columns of params, as `reference.sampling.COLUMNS`.
TEMPERATURE: tl.constexpr = tl.constexpr(0)
TOP_K: tl.constexpr = tl.constexpr(1)
TOP_P: tl.constexpr = tl.constexpr(2)
MIN_P: tl.constexpr = tl.constexpr(3)
PENALTY: tl.constexpr = tl.constexpr(4)
EXCLUDED: tl.constexpr = tl.constexpr(5)
GUIDANCE: tl.constexpr = tl.constexpr(6)
ORDER: tl.constexpr = tl.constexpr(7)

# Planes of stats, float64 [7, T, B].
LARGEST: tl.constexpr = tl.constexpr(0)  # c
EXPSUM: tl.constexpr = tl.constexpr(1)  # of c - largest c
HIGHEST: tl.constexpr = tl.constexpr(2)  # y
HIGHEST_ID: tl.constexpr = tl.constexpr(3)
BEST: tl.constexpr = tl.constexpr(4)  # y / temperature + noise, of what is kept
BEST_ID: tl.constexpr = tl.constexpr(5)
MASS: tl.constexpr = tl.constexpr(6)  # of what is kept
PLANES = 7


@triton.jit
def param(params_ptr, row_R, params_row, column: tl.constexpr):
    """A column of the level's params, float32; `params_ptr` is at the level."""
    return tl.load(params_ptr + row_R * params_row + column)


@triton.jit
def leader_of(leaders_ptr, row_R, T, PAIRED: tl.constexpr):
    """The row whose code each row takes, int64; rows from T on take the last."""
    row_R = tl.minimum(row_R, T - 1).to(tl.int64)
    return tl.minimum(tl.maximum(tl.load(leaders_ptr + row_R), 0), T - 1) if PAIRED else row_R


@triton.jit
def guided(logits_ptr, followers_ptr, scale_R, row_R, id_RW, inside_RW, logits_row, PAIRED: tl.constexpr):
    """c [R, W] float32: the leader's logits, against its follower's where it has one; -inf outside."""
    c_RW = tl.load(logits_ptr + row_R[:, None] * logits_row + id_RW, inside_RW, other=float("-inf"))
    if PAIRED:
        follower_R = tl.load(followers_ptr + row_R)
        other_RW = tl.load(logits_ptr + follower_R[:, None] * logits_row + id_RW, inside_RW, other=0.0)
        mixed_RW = scale_R[:, None] * (c_RW - other_RW) + other_RW
        c_RW = tl.where(inside_RW & (follower_R != row_R)[:, None], mixed_RW, c_RW)
    return tl.where(c_RW == 0, 0.0, c_RW)  # -0 and 0 are equal


@triton.jit
def highest(stats_ptr, row_R, T, blocks, BLOCKS: tl.constexpr):
    """m and its lowest id."""
    b_B = tl.arange(0, BLOCKS)
    at_RB = row_R[:, None] * blocks + b_B[None, :]
    plane = row_R * 0 + T
    inside_RB = (b_B < blocks)[None, :]
    y_RB = tl.load(stats_ptr + (plane * (HIGHEST * blocks))[:, None] + at_RB, inside_RB, other=float("-inf"))
    id_RB = tl.load(stats_ptr + (plane * (HIGHEST_ID * blocks))[:, None] + at_RB, inside_RB, other=0.0)
    m_R = tl.max(y_RB, 1)
    id_R = tl.min(tl.where((y_RB == m_R[:, None]) & inside_RB, id_RB, float("inf")), 1)
    return m_R, tl.where(id_R < float("inf"), id_R, 0.0).to(tl.int64)


@triton.jit
def kept(y_RW, id_RW, mass_RW, least_R, limits_ptr, own_R, T):
    """Which ids the limits and min_p keep; masses and `least` are float64."""
    key_R = tl.load(limits_ptr + own_R)
    last_R = tl.load(limits_ptr + T + own_R)
    key_RW = key_of(y_RW)
    first_RW = (key_RW > key_R[:, None]) | ((key_RW == key_R[:, None]) & (id_RW <= last_R[:, None]))
    return first_RW & (mass_RW >= least_R[:, None])
