// RVQ decode: out[t] = sum over l of codebooks[l][codes[t, l]], from the first level to the last; a negative code adds
// nothing. reference/rvq_decode.py defines it. All sums are float32, each in one order whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/codebook.h"
#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

// Codes as a caller's tensor holds them.
struct CodesView {
    const int64_t* data;  // [rows, levels], any strides
    int64_t rows, levels, row_stride, level_stride;

    int64_t at(int64_t row, int64_t level) const { return data[row * row_stride + level * level_stride]; }
};

struct RvqDecode {
    CodesView codes;
    int64_t dim;
    std::vector<Codebook> codebooks;  // one a level
    int threads;
    Isa isa;

    float* out;  // [rows, dim]
};

void rvq_decode(const RvqDecode& p);

// The gradient of each codebook: row k is the sum, in order of the rows, of the gradients of the rows whose code is k.
struct RvqDecodeBackward {
    struct Gradient {
        float* words;  // [entries, dim], zero at first
        int64_t entries;
    };

    const float* grad;  // [rows, dim], a row's elements adjacent
    int64_t row_stride, dim;
    CodesView codes;
    std::vector<Gradient> gradients;  // one a level
    int threads;
};

void rvq_decode_backward(const RvqDecodeBackward& p);

}  // namespace longcat
