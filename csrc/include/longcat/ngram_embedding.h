// N-gram embedding: hash, lookup, projection and mean. reference/ngram_embedding.py defines it.
//
// A live token has a hash that is not 0. Its output is (word[id] + sum over tables i of projections[i] row_i) / (1 +
// N); the others have no product, only their word row. Each sum is float32, in one order whatever the number of threads
// and whatever else is in the batch.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

// Integers of batch rows as a caller's tensor holds them.
struct IdsView {
    const int64_t* data;  // [batch, places], any strides; null: not given
    int64_t row_stride, place_stride;

    int64_t at(int64_t row, int64_t place) const { return data[row * row_stride + place * place_stride]; }
};

struct NgramRule {
    int64_t base, neighbors, splits;
    int64_t first_ignored, end_ignored, eos;

    bool ignores(int64_t id) const { return id >= first_ignored && id < end_ignored; }
};

struct NgramEmbedding {
    // A matrix of the dtype of all, a row's elements adjacent.
    struct Matrix {
        const void* data;
        int64_t rows, width, stride;
    };
    struct Table {
        Matrix rows;        // [rows, width]
        Matrix projection;  // [dim, width]
    };

    IdsView ids, documents, history;
    int64_t batch, length, dim;
    NgramRule rule;
    DType dtype;
    Matrix word;
    std::vector<Table> tables;
    int threads;
    Isa isa;

    void* out;        // [batch, length, dim]
    int64_t* hashes;  // [batch, length, tables]
};

void ngram_embedding(const NgramEmbedding& p);

}  // namespace longcat
