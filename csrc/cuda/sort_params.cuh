// One pass of sort.cuh, and rows sorted by code.
#pragma once

#include "cuda/device.cuh"

namespace longcat::cuda {

constexpr u32 kSortThreads = 256, kSortDigits = 256, kSortRows = 2048, kSegmentThreads = 128;

// Columns of one thread that sums segments.
constexpr int kSegmentColumns = 4;

struct SortPass {
    i64 rows;
    const i64* left;   // how many rows there are if not `rows`; null: `rows`
    const i64* codes;  // with this stride; null: by mix(mix(row) ^ key)
    i64 stride;
    int entries;
    u32 key;
    int shift, blocks;
    const int* from;  // row numbers as they stand; null: 0, 1, ...
    int* to;
    u32* places;  // [digits, blocks]
};

// Rows in the order of their codes, those of one code in their own order.
struct SortedRows {
    i64 rows;
    const i64* codes;
    i64 stride;
    int entries;
    const int* order;  // [rows]

    // The first place whose code is at least `entry`; codes out of range count as `entries`.
    LC_DEVICE i64 first_place(i64 entry) const {
        i64 low = 0, high = rows;
        while (low < high) {
            const i64 middle = (low + high) / 2, code = codes[order[middle] * stride];
            if (code >= 0 && code < entry)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

}  // namespace longcat::cuda
