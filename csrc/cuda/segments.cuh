// Sums of the rows of each code, in double, added in the order of the rows.
#pragma once

#include "cuda/sort.cuh"

namespace longcat::cuda {

// Adds rows order[first, end) of a matrix to this thread's columns; the loads of the columns do not wait for each
// other.
LC_DEVICE void add_rows(double (&sums)[kSegmentColumns], const void* rows, int type, i64 row_stride, const int* order,
                        i64 first, i64 end, int column, int dim) {
    for (i64 place = first; place < end; ++place) {
        const i64 from = order[place] * row_stride;
        LC_UNROLL for (int i = 0; i < kSegmentColumns; ++i) {
            const int d = column + i * int(kSegmentThreads);
            if (d < dim) sums[i] += double(load(rows, type, from + d));
        }
    }
}

LC_DEVICE int first_column() { return int(block_index_y() * kSegmentThreads) * kSegmentColumns + int(thread_index()); }

}  // namespace longcat::cuda
