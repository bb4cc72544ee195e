// Sorting of row numbers on a device.
#pragma once

#include <algorithm>

#include "cuda/queue.h"
#include "cuda/sort_params.cuh"

namespace longcat::cuda {

struct SortScratch {
    int* orders[2];
    u32* places;
    int blocks;

    SortScratch(Arena& arena, int64_t rows) : blocks(int(blocks_of(rows, kSortRows))) {
        for (int*& order : orders) order = arena.take<int>(rows);
        places = arena.take<u32>(int64_t(kSortDigits) * blocks);
    }
};

// Sorts by `bits` bits of the key in `pass`; gives the sorted row numbers, which stand in the scratch.
inline const int* sort_rows(Queue& queue, SortPass pass, int bits, const SortScratch& scratch) {
    pass.places = scratch.places, pass.blocks = scratch.blocks;
    int* to = pass.from == scratch.orders[0] ? scratch.orders[1] : scratch.orders[0];
    for (pass.shift = 0; pass.shift < bits; pass.shift += 8) {
        pass.to = to;
        queue.run({"sort_count", unsigned(pass.blocks), 1, kSortThreads}, pass);
        queue.run({"sort_scan", pass.blocks > 0 ? 1u : 0u, 1, kSortThreads}, pass);
        queue.run({"sort_scatter", unsigned(pass.blocks), 1, kSortThreads}, pass);
        pass.from = to;
        to = to == scratch.orders[0] ? scratch.orders[1] : scratch.orders[0];
    }
    return pass.from;
}

inline SortedRows sort_by_code(Queue& queue, const i64* codes, int64_t stride, int64_t rows, int entries,
                               const SortScratch& scratch) {
    LC_CHECK(rows < (int64_t(1) << 31), "cuda: there must be fewer than 2^31 rows");
    SortPass pass = {};
    pass.rows = rows, pass.codes = codes, pass.stride = stride, pass.entries = entries;
    int bits = 1;
    while (bits < 31 && (entries >> bits) != 0) ++bits;
    return {rows, codes, stride, entries, sort_rows(queue, pass, bits, scratch)};
}

}  // namespace longcat::cuda
