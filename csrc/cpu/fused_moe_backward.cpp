#include "longcat/fused_moe_backward.h"

#include "moe_rows.h"

namespace longcat {
namespace {

// Gradients of one expert's activations, in panels of hidden units, and what becomes of them.
void activation_share(const FusedMoeInputGrad& p, const GemmKernels& kernels, const RoutingPlan& plan,
                      const float* weights, const Share& share, Room& room, float* by_weight) {
    const int64_t first_row = plan.offsets[size_t(share.group)], columns = kernels.panel_columns;
    const int64_t panels = ceil_div(p.width, columns), size = bytes_of(p.dtype);
    const Left left{
        plan.rows_of(share.group), p.dim, {p.grad.data, p.dtype, p.grad.stride, &plan.token[size_t(first_row)]}, false};
    const Lines lines{p.down.data, p.dtype, p.down.row_stride};
    const auto panel = [&](int64_t at) {
        const bool ends = at == panels && share.group + 1 < p.experts;
        const int64_t expert = share.group + ends, i = ends ? 0 : at;
        return Panel{matrix_lines(lines, p.down.expert_stride, expert), halves_of(kernels, p.width, i), p.dim, true};
    };
    const auto target = [](const Place&, float* tile, int64_t&) { return tile; };
    const auto take = [&](const Place& place, const float* tile) {
        const int64_t row = first_row + place.row, column = place.panel * columns;
        const int64_t gate = (row * 2 * p.width + column) * size, up = gate + p.width * size;
        SwigluGradTile t{};
        t.tile = tile, t.rows = place.rows, t.count = std::min(columns, p.width - column);
        t.dtype = p.dtype, t.pitch = 2 * p.width;
        t.gate = static_cast<const char*>(p.hidden) + gate, t.up = static_cast<const char*>(p.hidden) + up;
        t.grad_gate = static_cast<char*>(p.grad_hidden) + gate, t.grad_up = static_cast<char*>(p.grad_hidden) + up;
        t.weights = weights + row, t.by_weight = by_weight + row * panels + place.panel, t.by_weight_pitch = panels;
        kernels.swiglu_grad(t);
    };
    multiply(kernels, left, share.first_panel, share.last_panel, room, panel, target, take);
}

void weight_of_slots(const FusedMoeInputGrad& p, const GemmKernels& kernels, const RoutingPlan& plan,
                     const float* by_weight) {
    const int64_t panels = ceil_div(p.width, kernels.panel_columns), size = bytes_of(p.dtype);
    take_turns(p.threads, p.tokens, [&](int, int64_t token) {
        float identity = 0;
        bool known = false;
        for (int64_t slot = token * p.slots; slot < (token + 1) * p.slots; ++slot) {
            const int32_t row = plan.row[size_t(slot)];
            float sum = 0;
            if (row >= 0) {
                for (int64_t i = 0; i < panels; ++i) sum += by_weight[row * panels + i];
            } else if (p.ids[slot] >= p.experts) {
                if (!known)
                    identity =
                        kernels.dot(static_cast<const char*>(p.grad.data) + token * p.grad.stride * size,
                                    static_cast<const char*>(p.x.data) + token * p.x.stride * size, p.dtype, p.dim);
                known = true, sum = identity;
            }
            p.grad_weights[slot] = sum;
        }
    });
}

// Outer products of rows, summed over the rows of each expert: out [experts, rows, columns].
// `left(e)` gives the rows; `right(share, room)` the other side, of which column 0 is the share's first.
template <class LeftOf, class RightOf>
void outer_products(const GemmKernels& kernels, const FusedMoeWeightGrad& p, const RoutingPlan& plan, int64_t rows,
                    int64_t columns, void* out, const LeftOf& left, const RightOf& right) {
    const int64_t width = kernels.panel_columns, panels = ceil_div(columns, width), size = bytes_of(p.grad_dtype);
    int64_t depth = 0;
    for (int64_t e = 0; e < p.experts; ++e) depth = std::max(depth, plan.rows_of(e));
    auto rooms = rooms_for(p.threads, most_block_units(kernels, p.experts, left), panel_units(kernels, depth));
    std::vector<Buffer<uint32_t>> more;
    for (int t = 0; t < p.threads; ++t) more.emplace_back(ceil_div(depth * panels * width, kernels.step));
    const auto parts =
        shares(p.experts, p.threads, [&](int64_t e) { return p.add && plan.rows_of(e) == 0 ? 0 : panels; });
    take_turns(p.threads, int64_t(parts.size()), [&](int t, int64_t i) {
        const Share& share = parts[size_t(i)];
        char* first = static_cast<char*>(out) + share.group * rows * columns * size;
        const Lines lines = right(share, more[size_t(t)].data());
        const auto panel = [&](int64_t at) {
            return Panel{lines, halves_of(kernels, columns - share.first_panel * width, at - share.first_panel),
                         plan.rows_of(share.group), true};
        };
        const auto target = [](const Place&, float* tile, int64_t&) { return tile; };
        const auto take = [&](const Place& place, const float* tile) {
            const int64_t column = place.panel * width, count = std::min(width, columns - column);
            kernels.store(tile, width, place.rows, count, first + (place.row * columns + column) * size, p.grad_dtype,
                          columns, p.add);
        };
        multiply(kernels, left(share.group), share.first_panel, share.last_panel, rooms[size_t(t)], panel, target,
                 take);
    });
}

void gate_up_grad(const GemmKernels& kernels, const FusedMoeWeightGrad& p, const RoutingPlan& plan) {
    const auto left = [&](int64_t e) {
        const Lines lines = rows_from(p.grad_hidden, p.dtype, 2 * p.width, plan.offsets[size_t(e)]);
        return Left{2 * p.width, plan.rows_of(e), lines, true};
    };
    const auto right = [&](const Share& share, uint32_t*) {
        const int64_t column = share.first_panel * kernels.panel_columns;
        return Lines{static_cast<const char*>(p.x.data) + column * bytes_of(p.dtype), p.dtype, p.x.stride,
                     plan.token.data() + plan.offsets[size_t(share.group)]};
    };
    outer_products(kernels, p, plan, 2 * p.width, p.dim, p.grad_gate_up, left, right);
}

void down_grad(const GemmKernels& kernels, const FusedMoeWeightGrad& p, const RoutingPlan& plan) {
    const std::vector<float> weights = row_weights(plan, p.weights);
    const auto left = [&](int64_t e) {
        const Lines grad{p.grad.data, p.dtype, p.grad.stride, plan.token.data() + plan.offsets[size_t(e)]};
        return Left{p.dim, plan.rows_of(e), grad, true};
    };
    const auto right = [&](const Share& share, uint32_t* act) {
        const int64_t first = plan.offsets[size_t(share.group)], width = kernels.panel_columns;
        const int64_t column = share.first_panel * width, pitch = (share.last_panel - share.first_panel) * width;
        const Lines gate = rows_from(p.hidden, p.dtype, 2 * p.width, first);
        const Lines up{static_cast<const char*>(gate.data) + p.width * bytes_of(p.dtype), p.dtype, gate.stride};
        kernels.activate(gate, up, weights.data() + first, plan.rows_of(share.group), column,
                         std::min(pitch, p.width - column), act, pitch);
        return Lines{act, kernels.step == 1 ? DType::float32 : DType::bfloat16, pitch};
    };
    outer_products(kernels, p, plan, p.dim, p.width, p.grad_down, left, right);
}

}  // namespace

void fused_moe_input_grad(const FusedMoeInputGrad& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.products);
    const RoutingPlan plan(p.ids, p.tokens, p.slots, p.experts);
    const int64_t rows = plan.rows(), bytes = 2 * p.width * bytes_of(p.dtype);
    LC_CHECK(p.hidden_rows >= rows, "fused_moe_input_grad: hidden must have a row for each slot of a real expert");
    std::fill_n(static_cast<char*>(p.grad_hidden) + rows * bytes, (p.hidden_rows - rows) * bytes, 0);
    const std::vector<float> weights = row_weights(plan, p.weights);
    const int64_t panels = ceil_div(p.width, kernels.panel_columns);
    const Buffer<float> by_weight(rows * panels);
    const auto left = [&](int64_t e) { return Left{plan.rows_of(e), p.dim, {}, false}; };
    auto rooms = rooms_for(p.threads, most_block_units(kernels, p.experts, left), panel_units(kernels, p.dim));
    const auto parts = shares(p.experts, p.threads, [&](int64_t e) { return plan.rows_of(e) == 0 ? 0 : panels; });
    take_turns(p.threads, int64_t(parts.size()), [&](int t, int64_t i) {
        activation_share(p, kernels, plan, weights.data(), parts[size_t(i)], rooms[size_t(t)], by_weight.data());
    });
    weight_of_slots(p, kernels, plan, by_weight.data());

    MoeProduct product(p, plan);
    product.depth = 2 * p.width, product.by_depth = true;
    product.matrix = {p.gate_up.data, p.dtype, p.gate_up.row_stride}, product.expert_stride = p.gate_up.expert_stride;
    product.self = {p.grad.data, p.dtype, p.grad.stride}, product.out = p.grad_x;
    multiply_and_combine(kernels, product, [&](int64_t e) {
        const Lines lines = rows_from(p.grad_hidden, p.dtype, 2 * p.width, plan.offsets[size_t(e)]);
        return Left{plan.rows_of(e), 2 * p.width, lines, false};
    });
}

void fused_moe_weight_grad(const FusedMoeWeightGrad& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.products);
    const RoutingPlan plan(p.ids, p.tokens, p.slots, p.experts);
    LC_CHECK(p.hidden_rows >= plan.rows(),
             "fused_moe_weight_grad: hidden must have a row for each slot of a real expert");
    if (p.grad_gate_up != nullptr) gate_up_grad(kernels, p, plan);
    if (p.grad_down != nullptr) down_grad(kernels, p, plan);
}

}  // namespace longcat
