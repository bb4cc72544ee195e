// A depth transformer as the kernels read it: matrices as panels (packed, or made where they are read), vectors as
// float32; and the stages of products that a level is.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "depth_kernels.h"
#include "gemm.h"
#include "longcat/depth_decode.h"

namespace longcat {

// Columns are output features; `gated` ones come in pairs, the first half of a panel and the second.
struct DepthMatrix {
    int64_t columns = 0, depth = 0;
    bool gated = false;
    Lines lines[2] = {};                            // its columns: of the matrix, or of the gate's and the other
    const char* panels = nullptr;                   // packed, or null
    const float *scale = nullptr, *bias = nullptr;  // in the order of the panels' columns

    int64_t panel_columns(const DepthKernels& kernels) const { return (gated ? 1 : 2) * kernels.half_columns; }
    int64_t panel_count(const DepthKernels& kernels) const { return ceil_div(columns, panel_columns(kernels)); }
    int64_t panel_bytes(const DepthKernels& kernels) const {
        return ceil_div(depth, kernels.row_depth) * 2 * kernels.row_bytes;
    }
};

struct DepthBlock {
    const float *norm1 = nullptr, *q_norm = nullptr, *k_norm = nullptr, *norm2 = nullptr;
    std::vector<DepthMatrix> q, k, v, out, up, down;  // one a weight set
};

struct DepthModel {
    const float *input_norm = nullptr, *rope = nullptr;
    std::vector<const float*> final_norm;  // one a weight set
    std::vector<DepthMatrix> projection;   // the same
    std::vector<DepthBlock> layers;
    std::vector<DepthMatrix> heads;  // one a level
};

inline int64_t set_count(const int64_t* sets, int64_t levels) {
    int64_t most = 0;
    for (int64_t l = 0; l < levels; ++l) most = std::max(most, sets[l]);
    return most + 1;
}

// The model that `packed` holds, where it lies.
DepthModel packed_model(const DepthShape& shape, const void* packed);

// The model of these weights: matrices where they lie, vectors copied to `room` of `vector_floats`.
DepthModel unpacked_model(const DepthShape& shape, const DepthWeights& weights, float* room);
int64_t vector_floats(const DepthShape& shape, const DepthWeights& weights);

// The columns of half a panel of a matrix that is not packed.
struct HalfPanel {
    Lines lines;
    Halves halves;

    // From step `first` of depth on.
    Lines from(int64_t first) const {
        Lines later = lines;
        later.data = static_cast<const char*>(lines.data) + first * bytes_of(lines.dtype);
        return later;
    }
};

HalfPanel half_panel(const GemmKernels& gemm, const DepthMatrix& matrix, int64_t panel, int half);

}  // namespace longcat
