// Depth decoding: all codes of a position, level by level, with a key-value cache that lives for one call.
//
//     input of level l: "sum": hidden, then the sum of table_j[c_j], j < l
//                       "last": hidden, then table_{l-1}[c_{l-1}]
//                       "last+hidden": hidden; start, then table_{l-1}[c_{l-1}], is added after the projection
//     z = P norm(input)
//     each layer: n = norm(z);  z += out(softmax(q k^T / sqrt(C)) v)
//                 n = norm(z);  z += down(gelu(up n)), or with a gate down(silu(gate n) * up n)
//     logits = head_l(norm(z)) + bias;  c_l is drawn from them: depth_sampler.h
//
// Activations are float32; where weights are bfloat16 and the processor multiplies pairs of those, what a product reads
// is rounded. What a row gets depends on nothing else in the batch, nor on the threads, to the last bit.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

constexpr int kMostLevels = 32, kDrawParams = 8;

enum class WeightFormat { float32, bfloat16, int8 };
enum class Conditioning { sum, last, last_and_hidden };

struct DepthShape {
    int64_t levels, hidden, dim, layers, heads, kv_heads, head_dim, ffn, given;
    Conditioning conditioning;
    bool ends, gated;
    float eps;
    const int64_t *classes, *attention_sets, *ffn_sets, *projection_sets, *norm_sets;  // [levels]

    int64_t table_width() const { return conditioning == Conditioning::last_and_hidden ? dim : hidden; }
};

// Rows of adjacent columns, or numbers, [sets, rows]; strides in elements; null: absent.
struct Strided {
    const void* data = nullptr;
    DType dtype = DType::float32;
    int64_t set = 0, row = 0;
};

struct DepthLayer {
    Strided norm1, q, q_bias, k, k_bias, v, v_bias, out, out_bias, q_norm, k_norm, norm2, gate, up, down;
};

struct DepthWeights {
    Strided input_norm, projection, projection_bias, final_norm;
    Strided rope;  // [2 levels head_dim / 2]
    std::vector<DepthLayer> layers;
    std::vector<Strided> heads, head_biases;  // one a level
};

struct PackDepth {
    DepthShape shape;
    const DepthWeights* weights;
    WeightFormat format;
    Isa isa;
    int threads;
    void* packed;  // of the size that `packed_depth_bytes` gives, on a cache line
};

void pack_depth(const PackDepth& p);

int64_t packed_depth_bytes(const PackDepth& p);

// The format of what `pack_depth` made; std::invalid_argument where it made it for another shape or processor.
WeightFormat check_packed_depth(const DepthShape& shape, const void* packed, int64_t bytes, Isa isa);

struct DepthDecode {
    DepthShape shape;
    int64_t rows;
    DType dtype;                  // of hidden, tables, start and embedding
    const DepthWeights* weights;  // read where `packed` is null
    const void* packed;
    WeightFormat format;          // of `packed`
    std::vector<Strided> tables;  // [levels]: rows and adjacent columns
    Strided hidden, start;        // [rows, hidden], [rows, dim] or null

    const float* params;  // [rows, levels, kDrawParams]
    int64_t params_row, params_level;
    const int64_t *seeds, *steps;
    const int64_t* prefix;  // [rows, forced], or null
    int64_t forced;
    const bool* active;      // [rows], or null: all
    const int64_t* leaders;  // [rows], or null: each its own
    const int64_t* history;  // [.., levels], or null
    const int64_t* offsets;  // [rows + 1]
    int threads;
    Isa isa;
    void* scratch;  // of `depth_scratch_bytes`

    float *logprobs, *drawn_logprobs;  // [rows, levels]
    void* embedding;                   // [rows, table width]
    float* logits;                     // [rows, classes of all levels with a head], or null
    int64_t* codes;                    // [rows, levels]
};

// What a call needs besides its outputs; the same however many of the rows are active.
int64_t depth_scratch_bytes(const DepthDecode& p);

void depth_decode(const DepthDecode& p);

}  // namespace longcat
