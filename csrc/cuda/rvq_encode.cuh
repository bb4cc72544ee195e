// RVQ encode on a device: csrc/include/longcat/rvq_encode.h defines it, rvq_window.cuh says how it is fast.
//
// A level is two launches: rvq_coarse_* screens all rows against the codebook by a float16 product, whose epilogue
// keeps the candidates; rvq_finish scores these exactly, takes the codeword off and prepares the rows for the next
// level.
//
// A shared codebook has no Gram form here, nor in Triton (cpu/rvq_gram.cpp has it). Its one product instead of L must
// be as exact as float32, that is three of float16: their error stays while residuals shrink, and with it the window
// would fill. For N = 4096 rows, D = 3584, K = 16384 and L = 8 on an H200 (790 TFLOP/s, 4.3 TB/s):
//
//     level by level     L 2 N D K flops                                                4.9 ms
//     Gram form          3 2 N D K flops, and (L - 1) 3 N K floats read or written      1.8 + 1.3 ms
//     its products       3 2 K K D flops, or half of it by symmetry, after each update  7.3 or 3.6 ms
//
// A training step gains nothing below N = 8600. Encoding alone would be 1.6 times as fast, with a K x K table (1.1 GB)
// and the N x K scores (0.27 GB) that these kernels never hold.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/rvq_coarse.cuh"
#include "cuda/rvq_coarse_mma.cuh"
#include "cuda/rvq_coarse_wgmma.cuh"
#include "cuda/rvq_gather.cuh"
#include "cuda/rvq_pack.cuh"

namespace longcat::cuda {

// Centres, scales and rounds row `t` of rows.residual for a codebook, and bounds what that costs; a block a row. Every
// thread has written the elements it reads here.
LC_DEVICE void prepare_row(const Rows& rows, const Codebook& next, i64 t) {
    LC_SHARED float slots[kRowThreads / kWarp];
    const float* row = rows.residual + t * rows.dim;
    float largest = 0;
    for (int d = int(thread_index()); d < rows.dim; d += int(kRowThreads)) {
        const float centred = fabsf(row[d] - next.centre[d]);
        largest = is_finite(row[d]) ? fmaxf(largest, centred) : infinity();
    }
    largest = block_max<kRowThreads>(largest, slots);
    const int word_exponent = *next.exponent;  // a packer may give any
    const bool ordinary = is_finite(largest) && !is_extreme(largest) && word_exponent >= -64 && word_exponent <= 64;
    const int exponent = ordinary ? scaling_exponent(largest) : 0;
    float rounded2 = 0, error2 = 0, row2 = 0, centre2 = 0;
    for (int d = int(thread_index()); d < rows.columns; d += int(kRowThreads)) {
        u16 bits = 0;
        if (ordinary && d < rows.dim) {
            const float scaled = (row[d] - next.centre[d]) * power_of_two(exponent);
            bits = half_of(scaled);
            const float rounded = value_of_half(bits), left = scaled - rounded;
            rounded2 += rounded * rounded, error2 += left * left;
            row2 += row[d] * row[d], centre2 += next.centre[d] * next.centre[d];
        }
        rows.halves[t * rows.columns + d] = bits;
    }
    rounded2 = block_sum<kRowThreads>(rounded2, slots), error2 = block_sum<kRowThreads>(error2, slots);
    row2 = block_sum<kRowThreads>(row2, slots), centre2 = block_sum<kRowThreads>(centre2, slots);
    if (thread_index() != 0) return;
    rows.bounds[t] =
        ordinary ? row_bound(rounded2, error2, row2, centre2, rows.dim, exponent, word_exponent) : no_bound();
}

// Marks whether row `t` has NaN or infinity; a masked row stays one. All threads of the block.
LC_DEVICE void mark_row(const Rows& rows, i64 t, bool masked) {
    LC_SHARED float slots[kRowThreads / kWarp];
    float bad = 0;
    for (int d = int(thread_index()); d < rows.dim; d += int(kRowThreads))
        bad = is_finite(rows.residual[t * rows.dim + d]) ? bad : 1.0f;
    bad = block_max<kRowThreads>(bad, slots);
    if (thread_index() == 0) rows.kinds[t] = masked ? kMasked : bad != 0 ? kNotFinite : kOrdinary;
}

struct Scored {
    double score;
    int entry;
};

LC_DEVICE void take_lower(Scored& best, double score, int entry) {
    if (score < best.score || (score == best.score && entry < best.entry)) best = {score, entry};
}

// Scores this warp's share of a list: of the candidates, or, where one fell out, of all codewords of the list's part.
LC_DEVICE void score_list(Scored& best, const RvqFinish& p, const float* row, const Nearest& list, float bound,
                          int part, int& turn) {
    const bool lost = list.low[Nearest::kKept] <= bound;
    const int first = p.schedule.first_tile(part) * kTileWords, end = p.schedule.first_tile(part + 1) * kTileWords;
    const int count = lost ? (end < p.book.entries ? end : p.book.entries) - first : Nearest::kKept;
    for (int i = 0; i < count; ++i) {
        if (!lost && !(list.low[i] <= bound)) break;  // they are in order
        if (turn++ % int(kRowThreads / kWarp) != int(thread_index() / kWarp)) continue;
        const int k = lost ? first + i : list.entry[i];
        take_lower(best, p.book.norm[k] - 2 * tree_dot(row, p.book.words + k * p.book.stride, p.book.dim), k);
    }
}

// The code of row `t`, in every thread.
LC_DEVICE int nearest_entry(const RvqFinish& p, i64 t) {
    LC_SHARED double scores[kRowThreads / kWarp];
    LC_SHARED int entries[kRowThreads / kWarp];
    const float* row = p.rows.residual + t * p.rows.dim;
    const int lists = p.schedule.parts * p.lists;
    float bound = largest_float();
    for (int list = 0; list < lists; ++list) bound = fminf(bound, p.nearest[list * p.rows.count + t].bound);
    int near = 0, only = 0;
    bool lost = false;
    for (int list = 0; list < lists; ++list) {
        const Nearest& known = p.nearest[list * p.rows.count + t];
        lost |= known.low[Nearest::kKept] <= bound;
        LC_UNROLL for (int i = 0; i < Nearest::kKept; ++i) if (known.low[i] <= bound)++ near, only = known.entry[i];
    }
    if (near <= 1 && !lost) return only;  // the same in all threads
    Scored best = {double_infinity(), 0x7fffffff};
    int turn = 0;
    for (int list = 0; list < lists; ++list)
        score_list(best, p, row, p.nearest[list * p.rows.count + t], bound, list / p.lists, turn);
    if (lane_index() == 0) scores[thread_index() / kWarp] = best.score, entries[thread_index() / kWarp] = best.entry;
    sync_block();
    for (u32 warp = 0; warp < kRowThreads / kWarp; ++warp) take_lower(best, scores[warp], entries[warp]);
    return best.score < double_infinity() ? best.entry : 0;
}

}  // namespace longcat::cuda

// Rounds x into the residual and prepares it for the first level.
LC_KERNEL(longcat::cuda::kRowThreads) rvq_prepare(LC_PARAMS(longcat::cuda::RvqPrepare) p) {
    using namespace longcat::cuda;
    const i64 t = block_index();
    const bool masked = p.mask != nullptr && !p.mask[t];
    for (int d = int(thread_index()); d < p.rows.dim; d += int(kRowThreads)) {
        const float value = masked ? 0.0f : load(p.x, p.type, t * p.row_stride + d * p.column_stride);
        p.rows.residual[t * p.rows.dim + d] = round_to(p.residual_type, value);
    }
    mark_row(p.rows, t, masked);
    prepare_row(p.rows, p.next, t);
}

// Exact scores, code, residual, the row of the next level.
LC_KERNEL(longcat::cuda::kRowThreads) rvq_finish(LC_PARAMS(longcat::cuda::RvqFinish) p) {
    using namespace longcat::cuda;
    LC_SHARED double slots[kRowThreads / kWarp];
    const i64 t = block_index();
    const RowKind kind = RowKind(p.rows.kinds[t]);
    const int code = kind == kOrdinary ? nearest_entry(p, t) : 0;
    sync_block();  // all warps have read the row
    const float* word = p.book.words + code * p.book.stride;
    double squares = 0;
    for (int d = int(thread_index()); d < p.rows.dim && kind != kMasked; d += int(kRowThreads)) {
        float& element = p.rows.residual[t * p.rows.dim + d];
        element = round_to(p.residual_type, element - word[d]);
        squares += double(element) * double(element);
    }
    squares = block_sum<kRowThreads>(squares, slots);
    if (thread_index() == 0) {
        p.codes[t * p.levels + p.level] = kind == kMasked ? -1 : code;
        p.squares[t] = squares;
    }
    if (p.is_last) return;
    mark_row(p.rows, t, kind == kMasked);
    prepare_row(p.rows, p.next, t);
}

// Mean squares over the rows that are not masked; a block a level.
LC_KERNEL(longcat::cuda::kRowThreads) rvq_losses(LC_PARAMS(longcat::cuda::RvqLosses) p) {
    using namespace longcat::cuda;
    LC_SHARED double slots[kRowThreads / kWarp];
    const i64 level = block_index();
    double sum = 0, kept = 0;
    for (i64 t = thread_index(); t < p.rows; t += kRowThreads) {
        sum += p.squares[level * p.rows + t];
        kept += p.kinds[t] == kMasked ? 0 : 1;
    }
    sum = block_sum<kRowThreads>(sum, slots), kept = block_sum<kRowThreads>(kept, slots);
    if (thread_index() == 0) p.losses[level] = float(sum / (kept * p.dim > 1 ? kept * p.dim : 1.0));
}
