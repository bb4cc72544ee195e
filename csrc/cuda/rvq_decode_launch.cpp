#include "cuda/rvq_decode_launch.h"

#include "cuda/rvq_decode_params.cuh"
#include "cuda/sort_launch.h"

namespace longcat::cuda {

void rvq_decode(Queue& queue, const RvqDecode& p) {
    LC_CHECK(p.books.size() <= size_t(kMostLevels), "rvq_decode: there must be at most 32 levels");
    RvqGather gather = {};
    gather.rows = p.rows, gather.dim = int(p.dim), gather.levels = int(p.levels), gather.type = kFloat32;
    gather.codes = reinterpret_cast<const i64*>(p.codes);
    gather.row_stride = p.row_stride, gather.level_stride = p.level_stride, gather.out = p.out;
    for (size_t level = 0; level < p.books.size(); ++level)
        gather.books[level] = {p.books[level].words, p.books[level].stride, int(p.books[level].entries)};
    queue.run({"rvq_gather", blocks_of(p.rows, 1), blocks_of(p.dim, kGatherThreads), kGatherThreads}, gather);
}

int64_t rvq_decode_backward(Queue& queue, const RvqDecodeBackward& p, void* workspace) {
    LC_CHECK(is_float(p.dtype), "rvq_decode: grad must be float32, bfloat16 or float16");
    Arena arena(workspace);
    const SortScratch scratch(arena, p.rows);
    if (workspace == nullptr) return arena.used();
    for (size_t level = 0; level < p.entries.size(); ++level) {
        SegmentSum sum = {};
        const i64* codes = reinterpret_cast<const i64*>(p.codes) + int64_t(level) * p.code_level_stride;
        sum.sorted = sort_by_code(queue, codes, p.code_row_stride, p.rows, int(p.entries[level]), scratch);
        sum.dim = int(p.dim), sum.type = int(p.dtype), sum.grad = p.grad, sum.out = p.out[level];
        sum.row_stride = p.row_stride, sum.column_stride = p.column_stride;
        queue.run({"segment_sum", unsigned(p.entries[level]), blocks_of(p.dim, 4 * kSegmentThreads), kSegmentThreads},
                  sum);
    }
    return arena.used();
}

}  // namespace longcat::cuda
