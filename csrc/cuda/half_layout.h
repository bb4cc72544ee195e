// layouts.HalfLayout: where the sections of a packed codebook stand.
#pragma once

#include "cuda/queue.h"

namespace longcat::cuda {

constexpr int kLayoutRows = 256, kLayoutColumns = 64;

inline int rounded_up(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

// A codebook of `entries` rows at `words`, packed at `packed`; `bytes` becomes the size of the packed form.
inline Codebook codebook_at(const float* words, int64_t stride, int64_t entries, int64_t dim, void* packed,
                            int64_t* bytes = nullptr) {
    Arena arena(packed);
    Codebook book = {};
    book.words = words, book.stride = stride, book.entries = int(entries), book.dim = int(dim);
    const int64_t rows = rounded_up(entries, kLayoutRows), columns = rounded_up(dim, kLayoutColumns);
    book.padded_entries = int(rows), book.columns = int(columns);
    book.halves = arena.take<u16>(rows * columns);
    book.norm = arena.take<double>(rows);
    book.half = arena.take<float>(rows);
    book.length = arena.take<float>(rows);
    book.error = arena.take<float>(rows);
    book.centre = arena.take<float>(dim);
    book.exponent = arena.take<int>(1);
    if (bytes != nullptr) *bytes = arena.used();
    return book;
}

// Partial sums of a codebook that is packed.
struct PackScratch {
    double* sums;
    int* largest;
    int chunks;

    PackScratch(Arena& arena, int64_t entries, int64_t dim)
        : chunks(int(entries < 128 * 64 ? (entries + 63) / 64 : 128)) {
        sums = arena.take<double>(chunks * (dim + 1));
        largest = arena.take<int>(1);
    }
};

// Four launches that fill the packed form.
void pack(Queue& queue, const Codebook& book, const PackScratch& scratch);

}  // namespace longcat::cuda
