// rvq_decode on a device.
#pragma once

#include <vector>

#include "cuda/queue.h"
#include "longcat/rvq_encode.h"

namespace longcat::cuda {

struct RvqDecode {
    int64_t rows, dim, levels;
    const int64_t* codes;  // [rows, levels] with these strides
    int64_t row_stride, level_stride;
    std::vector<longcat::RvqEncode::Codebook> books;
    float* out;  // [rows, dim]
};

void rvq_decode(Queue& queue, const RvqDecode& p);

struct RvqDecodeBackward {
    int64_t rows, dim;
    const void* grad;  // [rows, dim] with these strides
    DType dtype;
    int64_t row_stride, column_stride;
    const int64_t* codes;  // [rows, levels] with these strides
    int64_t code_row_stride, code_level_stride;
    std::vector<int64_t> entries;  // of each level
    std::vector<void*> out;        // [entries, dim] each, of the dtype of grad
};

// Gives the bytes that the workspace must have; with a null workspace that is all it does.
int64_t rvq_decode_backward(Queue& queue, const RvqDecodeBackward& p, void* workspace);

}  // namespace longcat::cuda
