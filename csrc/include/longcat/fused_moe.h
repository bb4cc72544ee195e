// Mixture of SwiGLU and identity experts, from ids to sum:
//
//     out[t] = residual[t] + sum over slots j of weights[t, j] * expert(ids[t, j])(x[t])
//     expert(e)(x) = down[e] (silu(gate) * up),   gate | up = gate_up[e] x      for e in [0, experts)
//     expert(e)(x) = x for e >= experts, 0 for e < 0
//
// Sums are float32, over slots in their order. What a token gets depends on no other token, to the last bit.
#pragma once

#include <cstdint>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

// Rows whose elements are adjacent.
struct MoeRows {
    const void* data;
    int64_t stride;  // in elements
};

// One matrix an expert, with adjacent elements in its rows.
struct MoeMatrices {
    const void* data;
    int64_t expert_stride, row_stride;  // in elements
};

struct FusedMoe {
    int64_t tokens, slots, experts, dim, width;
    DType dtype;
    DType products;         // `dtype`, or of float32 bfloat16: to what operands are rounded where it has kernels
    MoeRows x;              // [tokens, dim]
    MoeMatrices gate_up;    // [experts, 2 width, dim]: the rows of gate, then those of up
    MoeMatrices down;       // [experts, dim, width]
    const void* packed[2];  // what `pack_experts` made of the two, or null
    const int64_t* ids;     // [tokens, slots]
    const float* weights;   // [tokens, slots]; those of negative ids are not read
    MoeRows residual;       // [tokens, dim], or null
    int threads;
    Isa isa;

    void* hidden;  // [hidden_rows, 2 width]: gate | up of each row in the order of the plan, then zeros; or null
    int64_t hidden_rows;
    void* out;  // [tokens, dim], or null: only `hidden` is wanted
};

void fused_moe(const FusedMoe& p);

// Weights laid out as the products read them.
struct PackExperts {
    int64_t experts, dim, width;
    DType dtype, products;
    MoeMatrices gate_up, down;
    int threads;
    Isa isa;
    void* packed[2];  // on cache lines
};

void pack_experts(const PackExperts& p);

// Sizes of the two in bytes.
void packed_experts_bytes(int64_t experts, int64_t dim, int64_t width, DType products, Isa isa, int64_t bytes[2]);

}  // namespace longcat
