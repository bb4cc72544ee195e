#include "cuda/ema_update_launch.h"

#include "cuda/ema_update_params.cuh"
#include "cuda/half_layout.h"
#include "cuda/sort_launch.h"

namespace longcat::cuda {
namespace {

u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

EmaKernel kernel_params(const longcat::EmaUpdate& p, int64_t* restarted) {
    EmaKernel k = {};
    k.dim = int(p.dim), k.type = int(p.dtype), k.vectors = p.vectors, k.row_stride = p.row_stride;
    k.decay = p.decay, k.eps = p.eps, k.restart_threshold = p.restart_threshold;
    k.restart_fraction = p.restart_fraction, k.restart_count = p.restart_count, k.embed = p.embed;
    k.embed_ema = p.embed_ema, k.cluster_size_ema = p.cluster_size_ema;
    k.restarted = reinterpret_cast<i64*>(restarted);
    return k;
}

}  // namespace

int64_t ema_update(Queue& queue, const longcat::EmaUpdate& p, void* packed, int64_t* restarted, void* workspace) {
    LC_CHECK(is_float(p.dtype), "ema_update: vectors must be float32, bfloat16 or float16");
    Arena arena(workspace);
    const SortScratch by_code(arena, p.rows), by_turn(arena, p.rows);
    const PackScratch pack_scratch(arena, packed == nullptr ? 0 : p.entries, p.dim);
    EmaKernel k = kernel_params(p, restarted);
    k.starts = arena.take<i64>(p.entries + 1), k.turns = arena.take<int>(p.entries),
    k.scales = arena.take<double>(p.entries), k.totals = arena.take<EmaTotals>(1);
    if (workspace == nullptr) return arena.used();

    k.sorted = sort_by_code(queue, reinterpret_cast<const i64*>(p.codes), 1, p.rows, int(p.entries), by_code);
    queue.run({"ema_counts", blocks_of(p.entries + 1, kSortThreads), 1, kSortThreads}, k);
    queue.run({"ema_totals", 1, 1, kSortThreads}, k);
    SortPass pass = {};
    pass.rows = p.rows, pass.left = &k.totals->sorting, pass.from = k.sorted.order;
    pass.key = mix(mix(u32(uint64_t(p.seed))) ^ u32(uint64_t(p.seed) >> 32) ^ 0x9e3779b9u);
    k.restart_order = sort_rows(queue, pass, 32, by_turn);
    queue.run(
        {"ema_entries", unsigned(p.entries), blocks_of(p.dim, kSegmentColumns * kSegmentThreads), kSegmentThreads}, k);
    queue.run({"ema_restarted", blocks_of(p.entries, kSortThreads), 1, kSortThreads}, k);
    if (packed != nullptr) pack(queue, codebook_at(p.embed, p.dim, p.entries, p.dim, packed), pack_scratch);
    return arena.used();
}

}  // namespace longcat::cuda
