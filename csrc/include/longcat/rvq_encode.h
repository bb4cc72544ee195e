// RVQ encode: exact nearest-codeword quantization, level by level.
//
//     r_0 = x    code_l = argmin_k s(r_l, c_k)    r_(l+1) = r_l - c_code_l    s(r, c) = |c|^2 - 2 r.c
//
// s is defined to the last bit: products of floats are exact in double, and each of the two sums runs over them in the
// order of a tree that folds halves onto each other. Equal scores go to the lower index. reference/rvq_encode.py
// defines the same.
//
// How it is fast: scores of all codewords are screened in bfloat16 or float32, and only those that rounding could have
// misjudged are scored in double. cpu/rvq_kernels.h has the bound and its proof.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/dtypes.h"
#include "longcat/packed_codebook.h"

namespace longcat {

struct RvqEncode {
    int64_t rows, dim;
    const void* x;  // [rows, dim] of `dtype`, any strides
    DType dtype;
    int64_t row_stride, column_stride;
    std::vector<Codebook> levels;
    std::vector<PackedCodebook> packed;  // of each level, or empty: packed here, piece by piece
    const float* gram;                   // null, or what `rvq_gram` made of the codebook that all levels share
    const bool* mask;                    // [rows] or null: false rows are left out
    DType residual_dtype;                // the residual is rounded to it before and after each level
    int threads;
    Isa isa;

    void* quantized;  // [rows, dim] of `dtype`
    float* residual;  // [rows, dim]
    float* losses;    // [levels]
    int64_t* codes;   // [rows, levels]
};

void rvq_encode(const RvqEncode& p);

// Products c_j.d_k of all pairs, for the Gram form: gram[j * packed.padded + k]. Needs panels of floats.
void rvq_gram(const Codebook& book, const PackedCodebook& packed, int threads, float* gram);

}  // namespace longcat
