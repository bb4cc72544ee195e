// The inner loops of depth decoding, compiled for each instruction set.
//
// Weights are panels of columns (output features), two halves side by side, a row for each step of depth: floats, pairs
// of bfloat16 along depth, or bytes with a scale a column. Each element of a product is one chain of multiply-adds from
// the first step of depth to the last, whatever tile it is in: its bits depend neither on the other rows nor on the
// threads.
#pragma once

#include <cstdint>

#include "longcat/depth_decode.h"
#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

// At most `tile_rows` rows times half a panel, or at most `wide_rows` rows times both halves.
struct DepthTile {
    const void* x;    // elements of products
    int64_t x_pitch;  // bytes from row to row
    int rows, halves;
    const void* weights;
    int64_t half_pitch, row_pitch;  // bytes from half to half, from row to row
    int64_t steps;                  // rows of the panel
    float* sums;                    // row after row, `sums_pitch` floats apart; the second half's follow the first's
    int64_t sums_pitch;
    bool go_on;         // from the sums that are there, not from zero
    const char* ahead;  // what to bring closer meanwhile, `ahead_step` bytes further a row of the panel
    int64_t ahead_step;
};

// Sums of a panel that become results: times a scale, plus a bias.
struct DepthSums {
    const float* sums;
    int64_t pitch, rows, count;
    const float *scale, *bias;  // of the panel's columns, or null
};

// Query heads that share a key head.
struct DepthGroup {
    int64_t heads, width;
    int64_t steps;         // cached levels, at most kMostLevels
    const float* queries;  // [heads, width]; not read at the first level, whose softmax is 1
    const float *keys, *values;
    int64_t pitch;  // floats from level to level in keys and values
    float scale;
};

struct DepthKernels {
    int tile_rows, wide_rows, half_columns;
    int step;           // elements of products in four bytes of x: two bfloat16, or one float
    int64_t row_bytes;  // of a row of half a panel
    int row_depth;      // steps of depth in it

    void (*product)(const DepthTile& tile);

    // Results, written or added.
    void (*put)(const DepthSums& sums, float* out, int64_t pitch, bool add);

    // gelu(result), or `gated`: silu(result of the first half) * result of the second; as elements of products.
    void (*activate)(const DepthSums& sums, bool gated, void* out, int64_t pitch);

    // x / sqrt(mean of x^2 + eps) * weight as elements of products; x itself without a weight.
    void (*norm)(const float* x, const float* weight, float eps, int64_t dim, void* out);

    // The same for each head in place, without a weight none; then the rotation by `rope`, cosines and, `rope_pitch`
    // further, sines of half a head, or null.
    void (*turn)(float* x, const float* weight, float eps, const float* rope, int64_t rope_pitch, int64_t heads,
                 int64_t width);

    // softmax(query . keys * scale) values of each head, as elements of products; `room` is for a head.
    void (*attend)(const DepthGroup& group, float* room, void* out);

    // sum[j] += row[j].
    void (*add_row)(const void* row, DType dtype, int64_t count, float* sum);

    // Half a panel of floats in this format, rows `pitch` bytes apart, and the scales of its columns where there are.
    void (*encode)(const float* half, int64_t depth, void* out, int64_t pitch, float* scales);
};

const DepthKernels& depth_kernels(Isa isa, WeightFormat format);

}  // namespace longcat
