// What the kernels of ema_update are given.
#pragma once

#include "cuda/sort_params.cuh"

namespace longcat::cuda {

// What the whole codebook decides, on the device.
struct EmaTotals {
    double mean;  // of the moving counts
    i64 used;     // rows with a code
    i64 sorting;  // rows to be put in the order of restarts: `used`, or 0 where nothing restarts
};

struct EmaKernel {
    SortedRows sorted;
    int dim, type;
    const void* vectors;  // [rows, dim], a row's elements adjacent
    i64 row_stride;
    double decay, eps, restart_threshold, restart_fraction, restart_count;
    float *embed, *embed_ema;  // [entries, dim]
    float* cluster_size_ema;   // [entries]
    i64* starts;               // [entries + 1]: each entry's first place in the order
    int* turns;                // [entries]: the how manyth restart an entry is, or -1
    double* scales;            // [entries]: what makes a moving sum a codeword; 0: the codeword stays
    EmaTotals* totals;
    const int* restart_order;  // rows in the order in which restarts take them
    i64* restarted;            // [1]
};

}  // namespace longcat::cuda
