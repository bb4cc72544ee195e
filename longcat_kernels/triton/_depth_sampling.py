"""The sampler of `depth_decode`: what `reference.sampling.draw` defines, without a sort.

Five kernels a level: scores and sums of blocks of classes; masses; the threshold of top_k and top_p, by bisection on
integers that order as the scores do; the best of each block among what is kept; the code. A follower computes what
its leader does from the same numbers, so that pairs need not wait for each other.

What is kept by top_k and top_p is a beginning of the order: y falling, equal ones by rising id. With C and S the
number and the mass of the ids above a score, all with a score above the least one that has C < top_k and S < top_p M
are kept, and of those equal to it as many as fit, lowest ids first. Masses are rounded to float32 and added in
float64: a relative error of 2^-24. What decides between ids that are kept is computed in float64.

Dimension key
    T rows    V classes    B blocks of classes    N codes of history    R rows of a tile    W classes of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from longcat_kernels.triton._depth_rows import (
    BEST,
    BEST_ID,
    EXCLUDED,
    EXPSUM,
    GUIDANCE,
    HIGHEST,
    HIGHEST_ID,
    LARGEST,
    MASS,
    MIN_P,
    ORDER,
    PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    guided,
    highest,
    kept,
    leader_of,
    param,
)
from longcat_kernels.triton._numeric import tree_sum
from longcat_kernels.triton._screen import key_of, value_of

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
NO_LIMIT: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["N"])
def seen_kernel(
    seen_ptr,  # out [T, V] uint8 of zeros: 1 where the id stands in the row's history
    history_ptr,  # [N]
    offsets_ptr,  # [T + 1]
    N,
    V,
    history_row,
    seen_row,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), N)
    while begin < end:
        n = begin + tl.arange(0, CHUNK)
        id_N = tl.load(history_ptr + n * history_row, n < end, other=-1)
        tl.store(seen_ptr + row * seen_row + id_N, (id_N >= 0).to(tl.uint8), (id_N >= 0) & (id_N < V))
        begin += CHUNK


@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    logits_ptr,  # [T, V] float32
    params_ptr,
    leaders_ptr,  # [T]; not read unless PAIRED
    followers_ptr,  # [T]; not read unless PAIRED
    seen_ptr,  # [T, V] uint8; not read unless SEEN
    scores_ptr,  # out [T, V] float32: y
    stats_ptr,  # out: the first four planes
    T,
    V,
    blocks,
    logits_row,
    params_row,
    seen_row,
    PAIRED: tl.constexpr,
    SEEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    leader_R = leader_of(leaders_ptr, row_R, T, PAIRED)
    id_RW = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside_RW = id_RW < V
    scale_R = param(params_ptr, leader_R, params_row, GUIDANCE)
    c_RW = guided(logits_ptr, followers_ptr, scale_R, leader_R, id_RW, inside_RW, logits_row, PAIRED)
    largest_R = tl.max(c_RW, 1)
    base_R = tl.where(largest_R > float("-inf"), largest_R, 0.0).to(tl.float64)
    term_RW = tl.exp(c_RW.to(tl.float64) - base_R[:, None])

    y_RW = c_RW
    if SEEN:
        penalty_R1 = param(params_ptr, leader_R, params_row, PENALTY)[:, None]
        seen_RW = tl.load(seen_ptr + leader_R[:, None] * seen_row + id_RW, inside_RW, other=0) != 0
        y_RW = tl.where(seen_RW, tl.where(y_RW < 0, y_RW * penalty_R1, tl.div_rn(y_RW, penalty_R1)), y_RW)
    excluded_R = param(params_ptr, leader_R, params_row, EXCLUDED).to(tl.int32)
    y_RW = tl.where(id_RW < V - excluded_R[:, None], y_RW, float("-inf"))
    highest_R = tl.max(y_RW, 1)
    id_R = tl.min(tl.where(y_RW == highest_R[:, None], id_RW, NO_LIMIT), 1)

    kept_R = row_R < T
    at_R = row_R.to(tl.int64)
    tl.store(scores_ptr + at_R[:, None] * V + id_RW, y_RW, kept_R[:, None] & inside_RW)
    at_R = at_R * blocks + tl.program_id(1)
    plane_R = (at_R * 0 + T) * blocks
    tl.store(stats_ptr + plane_R * LARGEST + at_R, largest_R.to(tl.float64), kept_R)
    tl.store(stats_ptr + plane_R * EXPSUM + at_R, tree_sum(term_RW, ROWS, WIDTH, FOLDS), kept_R)
    tl.store(stats_ptr + plane_R * HIGHEST + at_R, highest_R.to(tl.float64), kept_R)
    tl.store(stats_ptr + plane_R * HIGHEST_ID + at_R, id_R.to(tl.float64), kept_R)


@triton.jit(do_not_specialize=["T"])
def mass_kernel(
    scores_ptr,  # [T, V] float32: y
    params_ptr,
    leaders_ptr,
    stats_ptr,
    masses_ptr,  # out [T, V] float32: exp((y - m) / temperature); 1 for temperature
    T,
    V,
    blocks,
    params_row,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    leader_R = leader_of(leaders_ptr, row_R, T, PAIRED)
    temperature_R = param(params_ptr, leader_R, params_row, TEMPERATURE).to(tl.float64)
    temperature_R = tl.where(temperature_R > 0, temperature_R, 1.0)
    own_R = tl.minimum(row_R, T - 1).to(tl.int64)
    m_R, _ = highest(stats_ptr, own_R, T, blocks, BLOCKS)
    id_RW = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    at_RW = own_R[:, None] * V + id_RW
    inside_RW = (id_RW < V) & (row_R < T)[:, None]
    y_RW = tl.load(scores_ptr + at_RW, inside_RW, other=float("-inf")).to(tl.float64)
    mass_RW = tl.exp((y_RW - m_R[:, None]) / temperature_R[:, None])
    tl.store(masses_ptr + at_RW, mass_RW.to(tl.float32), inside_RW)


@triton.jit
def _above(at_RW, scores_ptr, masses_ptr, low_R, V, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Number and mass of the ids whose keys are above `low`, number of those equal to it, and the mass of all."""
    count_RW = tl.zeros((ROWS, WIDTH), tl.int32)
    equal_RW = tl.zeros((ROWS, WIDTH), tl.int32)
    mass_RW = tl.zeros((ROWS, WIDTH), tl.float64)
    total_RW = tl.zeros((ROWS, WIDTH), tl.float64)
    for first in range(0, V, WIDTH):
        inside_RW = (first + tl.arange(0, WIDTH) < V)[None, :]
        key_RW = key_of(tl.load(scores_ptr + at_RW + first, inside_RW, other=float("-inf")))
        each_RW = tl.load(masses_ptr + at_RW + first, inside_RW, other=0.0).to(tl.float64)
        above_RW = inside_RW & (key_RW > low_R[:, None])
        count_RW += above_RW.to(tl.int32)
        equal_RW += (inside_RW & (key_RW == low_R[:, None])).to(tl.int32)
        mass_RW += tl.where(above_RW, each_RW, 0.0)
        total_RW += each_RW
    return tl.sum(count_RW, 1), tl.sum(mass_RW, 1), tl.sum(equal_RW, 1), tl.sum(total_RW, 1)


@triton.jit
def _fits(key_RW, each_RW, middle_R, count_RW, mass_RW):
    above_RW = key_RW > middle_R[:, None]
    return count_RW + above_RW.to(tl.int32), mass_RW + tl.where(above_RW, each_RW, 0.0)


@triton.jit
def _lowest(at_RW, scores_ptr, masses_ptr, low_R, high_R, most_R, share_R, V, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The least key in [low, high] above which are less than `most` ids and less mass than `share`; int64.

    High is known to be one. Three keys a pass over the scores.
    """
    while tl.max(high_R - low_R, 0) > 0:
        width_R = high_R - low_R
        one_R = low_R + width_R // 4
        two_R = low_R + width_R // 2
        three_R = low_R + width_R * 3 // 4
        count_1 = tl.zeros((ROWS, WIDTH), tl.int32)
        count_2 = tl.zeros((ROWS, WIDTH), tl.int32)
        count_3 = tl.zeros((ROWS, WIDTH), tl.int32)
        mass_1 = tl.zeros((ROWS, WIDTH), tl.float64)
        mass_2 = tl.zeros((ROWS, WIDTH), tl.float64)
        mass_3 = tl.zeros((ROWS, WIDTH), tl.float64)
        for first in range(0, V, WIDTH):
            inside_RW = (first + tl.arange(0, WIDTH) < V)[None, :]
            key_RW = key_of(tl.load(scores_ptr + at_RW + first, inside_RW, other=float("-inf")))
            key_RW = tl.where(inside_RW, key_RW, LOWEST)
            each_RW = tl.load(masses_ptr + at_RW + first, inside_RW, other=0.0).to(tl.float64)
            count_1, mass_1 = _fits(key_RW, each_RW, one_R, count_1, mass_1)
            count_2, mass_2 = _fits(key_RW, each_RW, two_R, count_2, mass_2)
            count_3, mass_3 = _fits(key_RW, each_RW, three_R, count_3, mass_3)
        fits_1 = (tl.sum(count_1, 1) < most_R) & (tl.sum(mass_1, 1) < share_R)
        fits_2 = (tl.sum(count_2, 1) < most_R) & (tl.sum(mass_2, 1) < share_R)
        fits_3 = (tl.sum(count_3, 1) < most_R) & (tl.sum(mass_3, 1) < share_R)
        fitting_R = tl.where(fits_1, one_R, tl.where(fits_2, two_R, tl.where(fits_3, three_R, high_R)))
        failing_R = tl.where(fits_1, low_R, tl.where(fits_2, one_R, tl.where(fits_3, two_R, three_R)) + 1)
        low_R = tl.where(width_R > 0, failing_R, low_R)
        high_R = tl.where(width_R > 0, fitting_R, high_R)
    return high_R


@triton.jit
def _id_of_rank(at_RW, scores_ptr, key_R, rank_R, V, WIDTH: tl.constexpr):
    """The id of the rank-th, from 1 on, of the scores with that key; V for ranks below 0."""
    found_R = tl.where(rank_R < 0, V, -1)
    before_R = rank_R * 0
    for first in range(0, tl.where(tl.max(rank_R, 0) < 0, 0, V), WIDTH):
        id_W = first + tl.arange(0, WIDTH)
        key_RW = key_of(tl.load(scores_ptr + at_RW + first, (id_W < V)[None, :], other=float("-inf")))
        equal_RW = ((id_W < V)[None, :] & (key_RW == key_R[:, None])).to(tl.int32)
        reached_RW = (equal_RW > 0) & (before_R[:, None] + tl.cumsum(equal_RW, 1) == rank_R[:, None])
        found_R = tl.maximum(found_R, tl.max(tl.where(reached_RW, id_W[None, :], -1), 1))
        before_R += tl.sum(equal_RW, 1)
    return found_R


@triton.jit(do_not_specialize=["T"])
def threshold_kernel(
    scores_ptr,  # [T, V] float32: y
    masses_ptr,  # [T, V] float32
    params_ptr,
    leaders_ptr,
    stats_ptr,
    limits_ptr,  # out [2, T] int32: kept are keys above the first, and ids up to the second of those equal to it
    T,
    V,
    blocks,
    params_row,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    leader_R = leader_of(leaders_ptr, row_R, T, PAIRED)
    own_R = tl.minimum(row_R, T - 1).to(tl.int64)
    top_k_R = param(params_ptr, leader_R, params_row, TOP_K).to(tl.int32)
    top_p_R = param(params_ptr, leader_R, params_row, TOP_P).to(tl.float64)
    is_random_R = param(params_ptr, leader_R, params_row, TEMPERATURE) > 0
    is_joint_R = param(params_ptr, leader_R, params_row, ORDER) > 0
    has_k_R = is_random_R & (top_k_R > 0) & (top_k_R < V)
    has_p_R = is_random_R & (top_p_R < 1)
    low_R = tl.full((ROWS,), LOWEST, tl.int64)
    m_R, _ = highest(stats_ptr, own_R, T, blocks, BLOCKS)
    high_R = key_of(m_R.to(tl.float32)).to(tl.int64)
    most_R = tl.where(has_k_R, top_k_R, NO_LIMIT)
    at_RW = own_R[:, None] * V + tl.arange(0, WIDTH)[None, :]
    if tl.max((has_k_R | has_p_R).to(tl.int32), 0) > 0:
        # The mass of which top_p is a share: of the first top_k, or of all.
        first_low_R = tl.where(has_k_R & has_p_R & (is_joint_R == 0), low_R, high_R)
        infinite_R = tl.full((ROWS,), float("inf"), tl.float64)
        key_R = _lowest(at_RW, scores_ptr, masses_ptr, first_low_R, high_R, most_R, infinite_R, V, ROWS, WIDTH)
        above_R, mass_R, equal_R, total_R = _above(at_RW, scores_ptr, masses_ptr, key_R, V, ROWS, WIDTH)
        each_R = _mass_of(key_R, m_R, params_ptr, leader_R, params_row)
        first_R = mass_R + tl.minimum(most_R - above_R, equal_R).to(tl.float64) * each_R
        whole_R = tl.where(has_k_R & (is_joint_R == 0), first_R, total_R)
        share_R = tl.where(has_p_R, top_p_R * whole_R, float("inf"))

        second_low_R = tl.where(has_k_R | has_p_R, low_R, high_R)
        key_R = _lowest(at_RW, scores_ptr, masses_ptr, second_low_R, high_R, most_R, share_R, V, ROWS, WIDTH)
        above_R, mass_R, equal_R, total_R = _above(at_RW, scores_ptr, masses_ptr, key_R, V, ROWS, WIDTH)
        each_R = _mass_of(key_R, m_R, params_ptr, leader_R, params_row)
        by_mass_R = tl.where(each_R > 0, tl.ceil((share_R - mass_R) / each_R), float("inf"))
        rank_R = tl.minimum(most_R - above_R, tl.minimum(by_mass_R, equal_R.to(tl.float64)).to(tl.int32))
        rank_R = tl.where((rank_R < equal_R) & (has_k_R | has_p_R), rank_R, -1)
        key_R = tl.where(has_k_R | has_p_R, key_R, LOWEST)
        last_R = _id_of_rank(at_RW, scores_ptr, key_R, rank_R, V, WIDTH)
    else:
        key_R = low_R
        last_R = tl.full((ROWS,), 0, tl.int32) + V
    tl.store(limits_ptr + own_R, key_R.to(tl.int32), row_R < T)
    tl.store(limits_ptr + T + own_R, last_R.to(tl.int32), row_R < T)


@triton.jit
def _mass_of(key_R, m_R, params_ptr, leader_R, params_row):
    """The mass of a score, as `mass_kernel` rounds it, float64."""
    temperature_R = param(params_ptr, leader_R, params_row, TEMPERATURE).to(tl.float64)
    y_R = value_of(key_R.to(tl.int32)).to(tl.float64)
    mass_R = tl.exp((y_R - m_R) / tl.where(temperature_R > 0, temperature_R, 1.0))
    return mass_R.to(tl.float32).to(tl.float64)


@triton.jit
def noise(seed_R, step_R, level, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gumbel noise of ids first .. first + WIDTH - 1, [R, W] float64: -log(-log1p(-u)), for 1 - u is exact."""
    low_R = (step_R & 0xFFFFFFFF).to(tl.uint32)
    high_R = ((step_R >> 32) & 0xFFFFFFFF).to(tl.uint32)
    block_RQ = tl.zeros((ROWS, 1), tl.uint32) + (first // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)[None, :]
    level_RQ = block_RQ * 0 + tl.cast(level, tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed_R[:, None], block_RQ, level_RQ, block_RQ * 0 + low_R[:, None], block_RQ * 0 + high_R[:, None]
    )
    word_RW = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, WIDTH))
    return -tl.log(-tl.log(1.0 - (word_RW.to(tl.float64) + 0.5) * 2.0**-32))


@triton.jit(do_not_specialize=["T", "level"])
def pick_kernel(
    scores_ptr,  # [T, V] float32: y
    limits_ptr,
    params_ptr,
    leaders_ptr,
    seeds_ptr,
    steps_ptr,
    stats_ptr,  # out: the last three planes
    T,
    V,
    blocks,
    level,
    params_row,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    leader_R = leader_of(leaders_ptr, row_R, T, PAIRED)
    own_R = tl.minimum(row_R, T - 1).to(tl.int64)
    temperature_R = param(params_ptr, leader_R, params_row, TEMPERATURE).to(tl.float64)
    is_random_R = temperature_R > 0
    temperature_R = tl.where(is_random_R, temperature_R, 1.0)
    m_R, _ = highest(stats_ptr, own_R, T, blocks, BLOCKS)
    id_RW = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside_RW = (id_RW < V) & is_random_R[:, None]
    y_RW = tl.load(scores_ptr + own_R[:, None] * V + id_RW, inside_RW, other=float("-inf"))
    at_R = own_R * blocks + tl.program_id(1)
    plane_R = (at_R * 0 + T) * blocks
    key_R = tl.load(limits_ptr + own_R)
    if tl.max(tl.max((inside_RW & (key_of(y_RW) >= key_R[:, None])).to(tl.int32), 1), 0) > 0:
        wide_RW = y_RW.to(tl.float64)
        mass_RW = tl.exp((wide_RW - m_R[:, None]) / temperature_R[:, None])
        least_R = param(params_ptr, leader_R, params_row, MIN_P).to(tl.float64)
        kept_RW = inside_RW & kept(y_RW, id_RW, mass_RW, least_R, limits_ptr, own_R, T)
        seed_R = tl.load(seeds_ptr + leader_R)
        step_R = tl.load(steps_ptr + leader_R)
        score_RW = wide_RW / temperature_R[:, None]
        score_RW += noise(seed_R, step_R, level, tl.program_id(1) * WIDTH, ROWS, WIDTH)
        score_RW = tl.where(kept_RW, score_RW, float("-inf"))
        best_R = tl.max(score_RW, 1)
        best_id_R = tl.min(tl.where(score_RW == best_R[:, None], id_RW, NO_LIMIT), 1)
        tl.store(stats_ptr + plane_R * BEST + at_R, best_R, row_R < T)
        tl.store(stats_ptr + plane_R * BEST_ID + at_R, best_id_R.to(tl.float64), row_R < T)
        tl.store(stats_ptr + plane_R * MASS + at_R, tl.sum(tl.where(kept_RW, mass_RW, 0.0), 1), row_R < T)
    else:
        tl.store(stats_ptr + plane_R * BEST + at_R, tl.full((ROWS,), float("-inf"), tl.float64), row_R < T)
        tl.store(stats_ptr + plane_R * BEST_ID + at_R, tl.zeros((ROWS,), tl.float64), row_R < T)
        tl.store(stats_ptr + plane_R * MASS + at_R, tl.zeros((ROWS,), tl.float64), row_R < T)
