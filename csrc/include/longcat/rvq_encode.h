// RVQ encode: exact nearest-codeword quantization, level by level.
//
//     r_0 = x    code_l = argmin_k s(r_l, c_k)    r_(l+1) = r_l - c_code_l    s(r, c) = |c|^2 - 2 r.c
//
// s is defined to the last bit: products of floats are exact in double, and each of the two sums runs over them in the
// order of `tree_dot`. Equal scores go to the lower index. reference/rvq_encode.py defines the same.
//
// How it is fast: scores of all codewords are screened in float32, and only those that rounding could have misjudged
// are scored in double. With u = 2^-24, D the width and g = D u / (1 - D u), a float32 dot product in any order, fused
// or not, errs by at most g |r| |c| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), so the
// float32 score fl(fl(|c|^2) - 2 dot) errs by at most
//
//     2 g |r| |c| + u |c|^2 + u (|c|^2 + 2 (1 + g) |r| |c|)  <=  2 (g + 2 u) |r| |c| + 2 u |c|^2.
//
// The kernel uses E = 2 (g + 4 u) |r| |c| + 6 u |c|^2 + D 2^-124: the excess covers the rounding of E itself, of score
// - E and score + E, of the double score (less than 2^-40 of either term), and products that underflow. Hence score - E
// <= s <= score + E, the nearest codeword has score - E <= min (score + E), and a codeword outside that window can
// neither win nor tie. Rows or codewords longer than 1e18, which could overflow, have every score in the window.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

struct RvqEncode {
    struct Codebook {
        const float* words;  // [entries, dim], a row's elements adjacent
        int64_t entries, stride;
        bool operator==(const Codebook& other) const {
            return words == other.words && entries == other.entries && stride == other.stride;
        }
    };

    int64_t rows, dim;
    const void* x;  // [rows, dim] of `dtype`, any strides
    DType dtype;
    int64_t row_stride, column_stride;
    std::vector<Codebook> levels;
    const bool* mask;      // [rows] or null: false rows are left out
    DType residual_dtype;  // the residual is rounded to it before and after each level
    int threads;
    Isa isa;

    void* quantized;  // [rows, dim] of `dtype`
    float* residual;  // [rows, dim]
    float* losses;    // [levels]
    int64_t* codes;   // [rows, levels]
};

void rvq_encode(const RvqEncode& p);

}  // namespace longcat
