"""The code of a level from what the sampler found in each block, its logprobs, and its embedding.

Dimension key
    T rows    L levels    V classes    E width of the tables    B blocks of classes    R rows of a tile    W of E
"""

from __future__ import annotations

import triton
import triton.language as tl

from longcat_kernels.triton._depth_rows import (
    BEST,
    BEST_ID,
    EXPSUM,
    GUIDANCE,
    LARGEST,
    MASS,
    MIN_P,
    TEMPERATURE,
    guided,
    highest,
    kept,
    leader_of,
    param,
)
from longcat_kernels.triton._gemm import cast


@triton.jit
def _plane(stats_ptr, plane: tl.constexpr, own_R, T, blocks, other, BLOCKS: tl.constexpr):
    """A plane of the rows' stats, [R, B] float64."""
    b_B = tl.arange(0, BLOCKS)
    at_RB = ((own_R * 0 + T) * plane + own_R)[:, None] * blocks + b_B[None, :]
    return tl.load(stats_ptr + at_RB, (b_B < blocks)[None, :], other=other)


@triton.jit
def _drawn(stats_ptr, params_ptr, leader_R, own_R, T, blocks, params_row, BLOCKS: tl.constexpr):
    """log sum exp c, whether the row is lost, and the id that is drawn; 0 in rows that are lost."""
    largest_RB = _plane(stats_ptr, LARGEST, own_R, T, blocks, float("-inf"), BLOCKS)
    largest_R = tl.max(largest_RB, 1)
    base_R = tl.where(largest_R > float("-inf"), largest_R, 0.0)
    term_RB = _plane(stats_ptr, EXPSUM, own_R, T, blocks, 0.0, BLOCKS) * tl.exp(largest_RB - base_R[:, None])
    logsum_R = base_R + tl.log(tl.sum(term_RB, 1))
    is_lost_R = (logsum_R - logsum_R) != 0  # NaN or infinite
    _, greedy_R = highest(stats_ptr, own_R, T, blocks, BLOCKS)
    best_RB = _plane(stats_ptr, BEST, own_R, T, blocks, float("-inf"), BLOCKS)
    best_id_RB = _plane(stats_ptr, BEST_ID, own_R, T, blocks, 0.0, BLOCKS)
    best_R = tl.max(best_RB, 1)
    is_best_RB = (best_RB == best_R[:, None]) & (best_RB > float("-inf"))
    id_R = tl.min(tl.where(is_best_RB, best_id_RB, float("inf")), 1)
    id_R = tl.where(id_R < float("inf"), id_R, 0.0).to(tl.int64)
    is_random_R = param(params_ptr, leader_R, params_row, TEMPERATURE) > 0
    return logsum_R, is_lost_R, tl.where(is_lost_R, 0, tl.where(is_random_R, id_R, greedy_R)), greedy_R


@triton.jit(do_not_specialize=["T"])
def code_kernel(
    logits_ptr,  # [T, V] float32
    scores_ptr,  # [T, V] float32: y
    limits_ptr,  # [2, T] int32
    stats_ptr,  # [7, T, B] float64
    params_ptr,
    leaders_ptr,
    followers_ptr,
    active_ptr,  # [T] uint8, of the leaders; not read unless ACTIVE
    prefix_ptr,  # [T, P], at the level; not read unless FORCED
    codes_ptr,  # out [T, L], at the level
    logprobs_ptr,  # out [T, L], at the level
    drawn_logprobs_ptr,  # out [T, L], at the level
    T,
    V,
    blocks,
    levels,
    logits_row,
    params_row,
    prefix_row,
    GIVEN: tl.constexpr,  # the level has no head: codes are the prefix
    FORCED: tl.constexpr,
    PAIRED: tl.constexpr,
    ACTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    leader_R = leader_of(leaders_ptr, row_R, T, PAIRED)
    own_R = tl.minimum(row_R, T - 1).to(tl.int64)
    if GIVEN:
        id_R = tl.minimum(tl.maximum(tl.load(prefix_ptr + leader_R * prefix_row), 0), V - 1)
        logprob_R = tl.zeros((ROWS,), tl.float64)
        drawn_R = tl.zeros((ROWS,), tl.float64)
    else:
        logsum_R, is_lost_R, id_R, greedy_R = _drawn(
            stats_ptr, params_ptr, leader_R, own_R, T, blocks, params_row, BLOCKS
        )
        if FORCED:
            forced_R = tl.minimum(tl.load(prefix_ptr + leader_R * prefix_row), V - 1)
            id_R = tl.where(forced_R >= 0, forced_R, id_R)
        scale_R = param(params_ptr, leader_R, params_row, GUIDANCE)
        ones_R1 = (row_R >= 0)[:, None]
        c_R1 = guided(logits_ptr, followers_ptr, scale_R, leader_R, id_R[:, None], ones_R1, logits_row, PAIRED)
        logprob_R = tl.sum(c_R1, 1).to(tl.float64) - logsum_R

        temperature_R = param(params_ptr, leader_R, params_row, TEMPERATURE).to(tl.float64)
        is_random_R = temperature_R > 0
        m_R, _ = highest(stats_ptr, own_R, T, blocks, BLOCKS)
        y_R1 = tl.load(scores_ptr + (own_R * V + id_R)[:, None])
        relative_R1 = (y_R1.to(tl.float64) - m_R[:, None]) / tl.where(is_random_R, temperature_R, 1.0)[:, None]
        least_R = param(params_ptr, leader_R, params_row, MIN_P).to(tl.float64)
        kept_R1 = kept(y_R1, id_R[:, None], tl.exp(relative_R1), least_R, limits_ptr, own_R, T)
        mass_R = tl.sum(_plane(stats_ptr, MASS, own_R, T, blocks, 0.0, BLOCKS), 1)
        drawn_R1 = tl.where(kept_R1, relative_R1 - tl.log(mass_R)[:, None], float("-inf"))
        point_R = tl.where(id_R == greedy_R, 0.0, float("-inf"))
        drawn_R = tl.where(is_random_R, tl.sum(drawn_R1, 1), point_R)
        logprob_R = tl.where(is_lost_R, float("nan"), logprob_R)
        drawn_R = tl.where(is_lost_R, float("nan"), drawn_R)
    if ACTIVE:
        is_active_R = tl.load(active_ptr + own_R) != 0
        id_R = tl.where(is_active_R, id_R, -1)
        logprob_R = tl.where(is_active_R, logprob_R, 0.0)
        drawn_R = tl.where(is_active_R, drawn_R, 0.0)
    tl.store(codes_ptr + own_R * levels, id_R, row_R < T)
    tl.store(logprobs_ptr + own_R * levels, logprob_R.to(tl.float32), row_R < T)
    tl.store(drawn_logprobs_ptr + own_R * levels, drawn_R.to(tl.float32), row_R < T)


@triton.jit(do_not_specialize=["T"])
def embed_kernel(
    codes_ptr,  # [T, L], at the level
    table_ptr,  # [rows, E]; not read unless TABLE
    total_ptr,  # [T, E] float32: the sum of embeddings, written anew at level 0
    next_ptr,  # out [T, E] float32: the next level's input
    ended_ptr,  # [L + 1, T] uint8, at the level: whether all codes so far are "end"
    embedding_ptr,  # out [T, E]; not written unless LAST
    T,
    V,
    E,
    levels,
    table_row,
    table_column,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TABLE: tl.constexpr,
    ENDS: tl.constexpr,
    SUM: tl.constexpr,  # the next input is the sum, and not the last row
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own_R = tl.minimum(row_R, T - 1).to(tl.int64)
    e_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside_RW = (row_R < T)[:, None] & (e_W < E)[None, :]
    at_RW = own_R[:, None] * E + e_W[None, :]
    id_R = tl.load(codes_ptr + own_R * levels)
    total_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    found_RW = tl.zeros((ROWS, WIDTH), tl.float32)
    if not FIRST:
        total_RW = tl.load(total_ptr + at_RW, inside_RW, other=0.0)
    if TABLE:
        entry_ptrs = table_ptr + id_R[:, None] * table_row + e_W.to(tl.int64)[None, :] * table_column
        found_RW = tl.load(entry_ptrs, inside_RW & (id_R >= 0)[:, None], other=0.0).to(tl.float32)
        total_RW += found_RW
        tl.store(total_ptr + at_RW, total_RW, inside_RW)
    sum_RW = total_RW
    if ENDS:
        ended_R = (tl.zeros((ROWS,), tl.int32) == 0) if FIRST else tl.load(ended_ptr + own_R) != 0
        if TABLE:
            ended_R = ended_R & (id_R == V - 1)
        if tl.program_id(1) == 0:
            tl.store(ended_ptr + T + own_R, ended_R.to(tl.uint8), row_R < T)
        sum_RW = tl.where(ended_R[:, None], 0.0, total_RW)
    if LAST:
        tl.store(embedding_ptr + at_RW, cast(sum_RW, TYPE), inside_RW)
    else:
        tl.store(next_ptr + at_RW, sum_RW if SUM else found_RW, inside_RW)
