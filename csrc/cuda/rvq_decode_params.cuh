// What the kernels of rvq_decode are given.
#pragma once

#include "cuda/rvq_params.cuh"
#include "cuda/sort_params.cuh"

namespace longcat::cuda {

// The gradient of one codebook.
struct SegmentSum {
    SortedRows sorted;
    int dim, type;
    const void* grad;  // [rows, dim] with these strides
    i64 row_stride, column_stride;
    void* out;  // [entries, dim] of the same type
};

}  // namespace longcat::cuda
