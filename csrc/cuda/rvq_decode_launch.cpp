#include "cuda/rvq_decode_launch.h"

#include "cuda/rvq_decode_params.cuh"
#include "cuda/sort_launch.h"

namespace longcat::cuda {

void rvq_decode(Queue& queue, const longcat::RvqDecode& p) {
    LC_CHECK(p.codebooks.size() <= size_t(kMostLevels), "rvq_decode: there must be at most 32 levels");
    RvqGather gather = {};
    gather.rows = p.codes.rows, gather.dim = int(p.dim), gather.levels = int(p.codes.levels), gather.type = kFloat32;
    gather.codes = reinterpret_cast<const i64*>(p.codes.data);
    gather.row_stride = p.codes.row_stride, gather.level_stride = p.codes.level_stride, gather.out = p.out;
    for (size_t level = 0; level < p.codebooks.size(); ++level)
        gather.books[level] = {p.codebooks[level].words, p.codebooks[level].stride, int(p.codebooks[level].entries)};
    queue.run({"rvq_gather", blocks_of(p.codes.rows, 1), blocks_of(p.dim, kGatherThreads), kGatherThreads}, gather);
}

int64_t rvq_decode_backward(Queue& queue, const longcat::RvqDecodeBackward& p, void* workspace) {
    Arena arena(workspace);
    const SortScratch scratch(arena, p.codes.rows);
    if (workspace == nullptr) return arena.used();
    for (size_t level = 0; level < p.gradients.size(); ++level) {
        SegmentSum sum = {};
        const auto& [out, entries] = p.gradients[level];
        const i64* codes = reinterpret_cast<const i64*>(p.codes.data) + int64_t(level) * p.codes.level_stride;
        sum.sorted = sort_by_code(queue, codes, p.codes.row_stride, p.codes.rows, int(entries), scratch);
        sum.dim = int(p.dim), sum.grad = p.grad, sum.row_stride = p.row_stride, sum.out = out;
        const unsigned columns = blocks_of(p.dim, kSegmentColumns * kSegmentThreads);
        queue.run({"segment_sum", unsigned(entries), columns, kSegmentThreads}, sum);
    }
    return arena.used();
}

}  // namespace longcat::cuda
