// EMA codebook update on a device: reference/ema_update.py defines it.
//
// Rows are sorted by code; then three launches: moving counts (a thread an entry), what needs all of them (one block),
// and the codebook (a block an entry and 512 columns), which writes every element once. Between the last two the used
// rows are put in the order in which restarting entries take them, if any does.
#pragma once

#include "cuda/ema_update_params.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rvq_pack.cuh"
#include "cuda/segments.cuh"

namespace longcat::cuda {

constexpr u32 kTotalThreads = kSortThreads, kTotalWarps = kTotalThreads / kWarp;

// How many of the lanes before this one, and how many of the warps before this warp's, have `vote`; then all of them.
struct Rank {
    int before, all;

    LC_DEVICE Rank(bool vote, int* slots) {
        const u32 votes = ballot(vote), warp = thread_index() / kWarp;
        if (lane_index() == 0) slots[warp] = int(count_bits(votes));
        sync_block();
        before = int(count_bits(votes & ((1u << lane_index()) - 1))), all = 0;
        for (u32 w = 0; w < kTotalWarps; ++w) {
            before += w < warp ? slots[w] : 0;
            all += slots[w];
        }
        sync_block();
    }
};

}  // namespace longcat::cuda

LC_KERNEL(longcat::cuda::kSortThreads) ema_counts(LC_PARAMS(longcat::cuda::EmaKernel) p) {
    using namespace longcat::cuda;
    const i64 entry = i64(block_index()) * kSortThreads + thread_index();
    if (entry > p.sorted.entries) return;
    const i64 first = p.sorted.first_place(entry);
    p.starts[entry] = first;
    if (entry == p.sorted.entries) return;
    const double count = double(p.sorted.first_place(entry + 1) - first);
    float& size = p.cluster_size_ema[entry];
    size = float(p.decay * double(size) + (1 - p.decay) * count);
}

LC_KERNEL(longcat::cuda::kTotalThreads) ema_totals(LC_PARAMS(longcat::cuda::EmaKernel) p) {
    using namespace longcat::cuda;
    LC_SHARED double sums[kTotalWarps];
    LC_SHARED int slots[kTotalWarps];
    const int entries = p.sorted.entries;
    double total = 0;
    for (int entry = int(thread_index()); entry < entries; entry += int(kTotalThreads))
        total += double(p.cluster_size_ema[entry]);
    total = block_sum<kTotalThreads>(total, sums);
    const double mean = total / entries, relative = p.restart_fraction * mean;
    const double threshold = relative <= p.restart_threshold ? p.restart_threshold : relative;  // NaN: none restarts
    const i64 used = p.starts[entries];
    int restarts = 0;
    for (int first = 0; first < entries; first += int(kTotalThreads)) {
        const int entry = first + int(thread_index());
        const bool dead = used > 0 && entry < entries && double(p.cluster_size_ema[entry]) < threshold;
        const Rank rank(dead, slots);
        if (entry < entries) {
            const double size = double(p.cluster_size_ema[entry]);
            const double smooth = total * (size + p.eps) / (total + entries * p.eps);
            p.turns[entry] = dead ? restarts + rank.before : -1;
            p.scales[entry] = smooth > 0 ? 1 / smooth : 0;
        }
        restarts += rank.all;
    }
    if (thread_index() != 0) return;
    *p.totals = {mean, used, restarts > 0 ? used : 0};
    *p.restarted = restarts;
}

LC_KERNEL(longcat::cuda::kSegmentThreads) ema_entries(LC_PARAMS(longcat::cuda::EmaKernel) p) {
    using namespace longcat::cuda;
    const i64 entry = block_index();
    const int column = first_column(), turn = p.turns[entry];
    const EmaTotals& totals = *p.totals;
    const bool restarts = turn >= 0;
    double sums[kSegmentColumns] = {};
    if (restarts) {
        const int* row = p.restart_order + turn % totals.used;
        add_rows(sums, p.vectors, p.type, p.row_stride, row, 0, 1, column, p.dim);
    } else {
        add_rows(sums, p.vectors, p.type, p.row_stride, p.sorted.order, p.starts[entry], p.starts[entry + 1], column,
                 p.dim);
    }
    const double scale = p.scales[entry];
    const double count = p.restart_count == 0 ? double(float(totals.mean)) : p.restart_count;
    LC_UNROLL for (int i = 0; i < kSegmentColumns; ++i) {
        const int d = column + i * int(kSegmentThreads);
        if (d >= p.dim) continue;
        float &word = p.embed[entry * p.dim + d], &moving = p.embed_ema[entry * p.dim + d];
        moving = float(restarts ? sums[i] * count : p.decay * double(moving) + (1 - p.decay) * sums[i]);
        if (restarts)
            word = float(sums[i]);
        else if (scale != 0)
            word = float(double(moving) * scale);
    }
}

// New counts of restarted entries, once no block needs the old ones.
LC_KERNEL(longcat::cuda::kSortThreads) ema_restarted(LC_PARAMS(longcat::cuda::EmaKernel) p) {
    using namespace longcat::cuda;
    const i64 entry = i64(block_index()) * kSortThreads + thread_index();
    if (entry >= p.sorted.entries || p.turns[entry] < 0) return;
    p.cluster_size_ema[entry] = float(p.restart_count == 0 ? p.totals->mean : p.restart_count);
}
