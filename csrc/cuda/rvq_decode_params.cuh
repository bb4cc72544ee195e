// What the kernels of rvq_decode are given.
#pragma once

#include "cuda/rvq_params.cuh"
#include "cuda/sort_params.cuh"

namespace longcat::cuda {

// The gradient of one codebook.
struct SegmentSum {
    SortedRows sorted;
    int dim;
    const float* grad;  // [rows, dim], a row's elements adjacent
    i64 row_stride;
    float* out;  // [entries, dim]
};

}  // namespace longcat::cuda
