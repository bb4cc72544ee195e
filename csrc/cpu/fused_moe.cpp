#include "longcat/fused_moe.h"

#include "moe_rows.h"

namespace longcat {
namespace {

// The columns of panel p: a register of gates and the same of ups.
Halves swiglu_halves(const GemmKernels& kernels, int64_t width, int64_t p) {
    const int64_t lanes = kernels.panel_columns / 2, first = p * lanes, count = std::min(lanes, width - first);
    return {{first, width + first}, {count, count}};
}

int64_t swiglu_panels(const GemmKernels& kernels, int64_t width) { return ceil_div(width, kernels.panel_columns / 2); }

// Activations of all rows, in units.
struct Activations {
    Buffer<uint32_t> units;
    int64_t pitch;
};

// Gate and up projections of panels of one expert, and their activations.
void up_share(const FusedMoe& p, const GemmKernels& kernels, const RoutingPlan& plan, const Share& share, Room& room,
              const Activations* act) {
    const int64_t units = panel_units(kernels, p.dim), panels = swiglu_panels(kernels, p.width);
    const int64_t first_row = plan.offsets[size_t(share.group)], lanes = kernels.panel_columns / 2;
    const Left left{
        plan.rows_of(share.group), p.dim, {p.x.data, p.dtype, p.x.stride, &plan.token[size_t(first_row)]}, false};
    const Lines lines{p.gate_up.data, p.dtype, p.gate_up.row_stride};
    const auto* packed = static_cast<const uint32_t*>(p.packed[0]);
    const auto panel = [&](int64_t at) {
        const bool ends = at >= panels && share.group + 1 < p.experts;
        const int64_t expert = share.group + ends, i = std::min(ends ? at - panels : at, panels - 1);
        return Panel{matrix_lines(lines, p.gate_up.expert_stride, expert), swiglu_halves(kernels, p.width, i), p.dim,
                     false, packed == nullptr ? nullptr : packed + (expert * panels + i) * units};
    };
    const auto target = [](const Place&, float* tile, int64_t&) { return tile; };
    const auto take = [&](const Place& place, const float* tile) {
        const int64_t row = first_row + place.row, column = place.panel * lanes, size = bytes_of(p.dtype);
        SwigluTile t{};
        t.tile = tile, t.rows = place.rows, t.count = std::min(lanes, p.width - column), t.dtype = p.dtype;
        if (act != nullptr) {
            t.act = reinterpret_cast<char*>(act->units.data() + row * act->pitch) + column * (4 / kernels.step);
            t.act_pitch = act->pitch * kernels.step;
        }
        if (p.hidden != nullptr) {
            t.hidden_pitch = 2 * p.width;
            t.gate = static_cast<char*>(p.hidden) + (row * t.hidden_pitch + column) * size;
            t.up = static_cast<char*>(t.gate) + p.width * size;
        }
        kernels.swiglu(t);
    };
    multiply(kernels, left, share.first_panel, share.last_panel, room, panel, target, take);
}

void up_pass(const FusedMoe& p, const GemmKernels& kernels, const RoutingPlan& plan, const Activations* act) {
    const auto left = [&](int64_t e) { return Left{plan.rows_of(e), p.dim, {}, false}; };
    auto rooms = rooms_for(p.threads, most_block_units(kernels, p.experts, left), panel_units(kernels, p.dim));
    const auto parts = shares(p.experts, p.threads,
                              [&](int64_t e) { return plan.rows_of(e) == 0 ? 0 : swiglu_panels(kernels, p.width); });
    take_turns(p.threads, int64_t(parts.size()),
               [&](int t, int64_t i) { up_share(p, kernels, plan, parts[size_t(i)], rooms[size_t(t)], act); });
}

void down_pass(const FusedMoe& p, const GemmKernels& kernels, const RoutingPlan& plan, const Activations& act) {
    MoeProduct product(p, plan);
    product.depth = p.width, product.weighted = true;
    product.matrix = {p.down.data, p.dtype, p.down.row_stride}, product.expert_stride = p.down.expert_stride;
    product.packed = static_cast<const uint32_t*>(p.packed[1]);
    product.self = {p.x.data, p.dtype, p.x.stride}, product.residual = {p.residual.data, p.dtype, p.residual.stride};
    product.out = p.out;
    multiply_and_combine(kernels, product, [&](int64_t e) {
        const uint32_t* units = act.units.data() + plan.offsets[size_t(e)] * act.pitch;
        return Left{plan.rows_of(e), p.width, {}, false, units, act.pitch};
    });
}

}  // namespace

void fused_moe(const FusedMoe& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.products);
    const RoutingPlan plan(p.ids, p.tokens, p.slots, p.experts);
    const int64_t rows = plan.rows();
    if (p.hidden != nullptr) {
        LC_CHECK(p.hidden_rows >= rows, "fused_moe: rows must be at least the slots of real experts");
        const int64_t bytes = 2 * p.width * bytes_of(p.dtype);
        std::fill_n(static_cast<char*>(p.hidden) + rows * bytes, (p.hidden_rows - rows) * bytes, 0);
    }
    if (p.out == nullptr) return up_pass(p, kernels, plan, nullptr);
    const int64_t units = ceil_div(p.width, kernels.step), pitch = odd_pitch(units);
    const Activations act{Buffer<uint32_t>(rows * pitch), pitch};
    if (p.width % kernels.step != 0)  // the last unit is half full
        for (int64_t row = 0; row < rows; ++row) act.units.data()[row * pitch + units - 1] = 0;
    up_pass(p, kernels, plan, &act);
    down_pass(p, kernels, plan, act);
}

void packed_experts_bytes(int64_t experts, int64_t dim, int64_t width, DType products, Isa isa, int64_t bytes[2]) {
    const GemmKernels& kernels = gemm_kernels(isa, products);
    bytes[0] = experts * swiglu_panels(kernels, width) * panel_units(kernels, dim) * 4;
    bytes[1] = experts * ceil_div(dim, kernels.panel_columns) * panel_units(kernels, width) * 4;
}

void pack_experts(const PackExperts& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.products);
    const int64_t ups = swiglu_panels(kernels, p.width), downs = ceil_div(p.dim, kernels.panel_columns);
    const int64_t up_units = panel_units(kernels, p.dim), down_units = panel_units(kernels, p.width);
    take_turns(p.threads, p.experts, [&](int, int64_t e) {
        const Lines first{p.gate_up.data, p.dtype, p.gate_up.row_stride},
            second{p.down.data, p.dtype, p.down.row_stride};
        const Lines up = matrix_lines(first, p.gate_up.expert_stride, e);
        const Lines down = matrix_lines(second, p.down.expert_stride, e);
        for (int64_t i = 0; i < ups; ++i)
            kernels.pack_columns(up, swiglu_halves(kernels, p.width, i), p.dim,
                                 static_cast<uint32_t*>(p.packed[0]) + (e * ups + i) * up_units);
        for (int64_t i = 0; i < downs; ++i)
            kernels.pack_columns(down, halves_of(kernels, p.dim, i), p.width,
                                 static_cast<uint32_t*>(p.packed[1]) + (e * downs + i) * down_units);
    });
}

}  // namespace longcat
