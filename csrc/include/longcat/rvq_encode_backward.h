// The gradient of rvq_encode to x, in one pass over the rows. With r_0 = x and r_(l+1) = r_l - c_l[codes_l], rounded to
// the residual's dtype as forward rounds it, and g the gradient of `quantized` (zero if there is none)
//
//     grad_x = g + sum over l of scales_l r_(l+1)          scales_l = 2 grad losses_l / number of elements that count
//
// in float32, from the first level to the last. Rows whose first code is negative get zero.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/codebook.h"
#include "longcat/dtypes.h"

namespace longcat {

struct RvqEncodeBackward {
    struct Matrix {
        const void* data;  // [rows, dim], any strides
        int64_t row_stride, column_stride;
    };

    int64_t rows, dim;
    DType dtype;  // of x, grad and grad_x
    Matrix grad;  // its data null: no gradient of `quantized`
    Matrix x;
    DType residual_dtype;
    const int64_t* codes;             // [rows, levels]; of a row that counts all in [0, entries)
    std::vector<Codebook> codebooks;  // one a level
    const float* scales;              // [levels], or null: no gradient of the losses
    int threads;

    void* grad_x;  // [rows, dim]
};

void rvq_encode_backward(const RvqEncodeBackward& p);

}  // namespace longcat
