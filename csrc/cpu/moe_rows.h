// Products of experts' rows with experts' matrices, summed over the slots of each token.
#pragma once

#include "gemm.h"
#include "longcat/fused_moe.h"
#include "longcat/moe_plan.h"

namespace longcat {

// Rows of `left(e)` times matrix e, then summed by token.
struct MoeProduct {
    const RoutingPlan& plan;
    int64_t tokens, slots, experts, dim;
    const int64_t* ids;    // [tokens, slots]
    const float* weights;  // [tokens, slots]
    int threads;

    int64_t depth = 0;
    Lines matrix{};  // of expert 0
    int64_t expert_stride = 0;
    bool by_depth = false;             // lines of the matrix are steps of depth, not columns
    const uint32_t* packed = nullptr;  // panels of all experts, or null
    bool weighted = false;             // rows have their weights, as identity slots always have
    Lines self{};                      // what an identity slot adds
    Lines residual{};                  // added to each token; data may be null
    void* out = nullptr;               // [tokens, dim] of the dtype of `self`

    // What a pass and its product have in common.
    template <class Pass>
    MoeProduct(const Pass& p, const RoutingPlan& its_plan)
        : plan(its_plan),
          tokens(p.tokens),
          slots(p.slots),
          experts(p.experts),
          dim(p.dim),
          ids(p.ids),
          weights(p.weights),
          threads(p.threads) {}
};

// The weight of each row; those of slots without a row are not read.
std::vector<float> row_weights(const RoutingPlan& plan, const float* weights);

// The lines of matrix e.
inline Lines matrix_lines(const Lines& first, int64_t expert_stride, int64_t expert) {
    Lines lines = first;
    lines.data = static_cast<const char*>(first.data) + expert * expert_stride * bytes_of(first.dtype);
    return lines;
}

// Rows [first, ...) of a plan in a matrix that has one row for each.
inline Lines rows_from(const void* data, DType dtype, int64_t stride, int64_t first) {
    return {static_cast<const char*>(data) + first * stride * bytes_of(dtype), dtype, stride};
}

// Units of a panel.
inline int64_t panel_units(const GemmKernels& kernels, int64_t depth) {
    return ceil_div(depth, kernels.step) * kernels.panel_columns;
}

// Columns [first, last) of all tokens, from products `y` whose rows are `pitch` apart.
void combine(const GemmKernels& kernels, const MoeProduct& p, int64_t first, int64_t last, const float* y,
             int64_t pitch);

constexpr int64_t kProductFloats = (16 << 20) / 4;  // of products that wait for their sum

// Multiplies the rows of each expert, which `left(e)` gives, and sums them by token: so many columns at a time that the
// products stay in the last cache.
template <class LeftOf>
void multiply_and_combine(const GemmKernels& kernels, const MoeProduct& p, const LeftOf& left) {
    const int64_t rows = p.plan.rows(), width = kernels.panel_columns, panels = ceil_div(p.dim, width);
    const int64_t step = std::clamp<int64_t>(kProductFloats / std::max<int64_t>(1, rows * width), 1, panels);
    const int64_t pitch = step * width, units = panel_units(kernels, p.depth);
    const Buffer<float> y(rows * pitch);
    auto rooms = rooms_for(p.threads, most_block_units(kernels, p.experts, left), units);
    for (int64_t start = 0; start < panels; start += step) {
        const int64_t count = std::min(step, panels - start);
        const auto parts = shares(p.experts, p.threads, [&](int64_t e) { return p.plan.rows_of(e) == 0 ? 0 : count; });
        take_turns(p.threads, int64_t(parts.size()), [&](int t, int64_t i) {
            const Share& part = parts[size_t(i)];
            const auto panel = [&](int64_t at) {
                const bool ends = at >= count && part.group + 1 < p.experts;
                const int64_t expert = part.group + ends, i = start + std::min(ends ? at - count : at, count - 1);
                return Panel{matrix_lines(p.matrix, p.expert_stride, expert), halves_of(kernels, p.dim, i), p.depth,
                             p.by_depth, p.packed == nullptr ? nullptr : p.packed + (expert * panels + i) * units};
            };
            float* first = y.data() + p.plan.offsets[size_t(part.group)] * pitch;
            const auto target = [&](const Place& place, float*, int64_t& out_pitch) {
                out_pitch = pitch;
                return first + place.row * pitch + place.panel * width;
            };
            const auto take = [](const Place&, const float*) {};
            multiply(kernels, left(part.group), part.first_panel, part.last_panel, rooms[size_t(t)], panel, target,
                     take);
        });
        combine(kernels, p, start * width, std::min(p.dim, (start + count) * width), y.data(), pitch);
    }
}

}  // namespace longcat
