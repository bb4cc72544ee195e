// RVQ decode on a device, and its gradient: rows sorted by code, then a block an entry.
#pragma once

#include "cuda/rvq_decode_params.cuh"
#include "cuda/rvq_gather.cuh"
#include "cuda/segments.cuh"

LC_KERNEL(longcat::cuda::kSegmentThreads) segment_sum(LC_PARAMS(longcat::cuda::SegmentSum) p) {
    using namespace longcat::cuda;
    const i64 entry = block_index(), first = p.sorted.first_place(entry), end = p.sorted.first_place(entry + 1);
    const int column = first_column();
    double sums[kSegmentColumns] = {};
    add_rows(sums, p.grad, kFloat32, p.row_stride, p.sorted.order, first, end, column, p.dim);
    LC_UNROLL for (int i = 0; i < kSegmentColumns; ++i) {
        const int d = column + i * int(kSegmentThreads);
        if (d < p.dim) p.out[entry * p.dim + d] = float(sums[i]);
    }
}
