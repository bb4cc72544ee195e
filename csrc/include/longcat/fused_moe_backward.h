// The gradients of fused_moe, given that of `out` and the pre-activations that forward saved. For a row r of expert e,
// token t and weight w, with a = silu(gate) * up:
//
//     da = down[e]^T grad[t]        grad_hidden[r] = w da * (up silu'(gate) | silu(gate))      grad_weights = <da, a>
//     grad_x[t] = sum of gate_up[e]^T grad_hidden[r]         grad_gate_up[e] = sum of grad_hidden[r] x[t]^T
//     grad_down[e] = sum of w grad[t] a^T
//
// and for an identity slot grad_x[t] += w grad[t], grad_weights = <grad[t], x[t]>.
#pragma once

#include "longcat/fused_moe.h"

namespace longcat {

struct FusedMoeInputGrad {
    int64_t tokens, slots, experts, dim, width;
    DType dtype, products;      // as forward has them
    MoeRows grad, x;            // [tokens, dim]
    MoeMatrices gate_up, down;  // as forward has them
    const int64_t* ids;
    const float* weights;
    const void* hidden;  // [hidden_rows, 2 width]
    int64_t hidden_rows;
    int threads;
    Isa isa;

    void* grad_x;         // [tokens, dim]
    float* grad_weights;  // [tokens, slots]
    void* grad_hidden;    // [hidden_rows, 2 width]; zeros past the last row
};

void fused_moe_input_grad(const FusedMoeInputGrad& p);

struct FusedMoeWeightGrad {
    int64_t tokens, slots, experts, dim, width;
    DType dtype, products;  // as forward has them
    MoeRows grad, x;
    const int64_t* ids;
    const float* weights;
    const void *hidden, *grad_hidden;  // [hidden_rows, 2 width]
    int64_t hidden_rows;
    int threads;
    Isa isa;

    bool add;  // to what is there
    DType grad_dtype;
    void* grad_gate_up;  // [experts, 2 width, dim], or null: not wanted
    void* grad_down;     // [experts, dim, width], or null
};

void fused_moe_weight_grad(const FusedMoeWeightGrad& p);

}  // namespace longcat
