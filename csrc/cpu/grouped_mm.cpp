#include "longcat/grouped_mm.h"

#include "gemm.h"

namespace longcat {
namespace {

char* offset(void* data, int64_t elements, DType dtype) {
    return static_cast<char*>(data) + elements * bytes_of(dtype);
}

// A group's matrix as lines, which are its rows where their elements are adjacent, else its columns.
Lines lines_of(const GroupedMM& p, const GroupedMM::Matrix& m, int64_t start) {
    return {offset(m.data, start, p.dtype), p.dtype, m.column_stride == 1 ? m.row_stride : m.column_stride};
}

Left left_of(const GroupedMM& p, const GroupedMM::Group& group) {
    return {group.rows, group.depth, lines_of(p, p.a, group.a), p.a.column_stride != 1};
}

void one_share(const GroupedMM& p, const GemmKernels& kernels, const Share& share, Room& room) {
    const GroupedMM::Group& group = p.groups[size_t(share.group)];
    const Lines lines = lines_of(p, p.b, group.b);
    const auto panel = [&](int64_t i) {
        return Panel{lines, halves_of(kernels, group.columns, i), group.depth, p.b.column_stride == 1};
    };
    const auto target = [](const Place&, float* tile, int64_t&) { return tile; };
    const auto take = [&](const Place& place, const float* tile) {
        const int64_t column = place.panel * kernels.panel_columns;
        const int64_t count = std::min<int64_t>(kernels.panel_columns, group.columns - column);
        char* to = offset(p.out.data, group.out + place.row * p.out.row_stride + column, p.dtype);
        kernels.store(tile, kernels.panel_columns, place.rows, count, to, p.dtype, p.out.row_stride, false);
    };
    multiply(kernels, left_of(p, group), share.first_panel, share.last_panel, room, panel, target, take);
}

}  // namespace

void grouped_mm(const GroupedMM& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.products);
    const auto groups = int64_t(p.groups.size());
    int64_t depth = 0;
    for (const GroupedMM::Group& group : p.groups) depth = std::max(depth, group.depth);
    const auto left = [&](int64_t g) { return left_of(p, p.groups[size_t(g)]); };
    auto rooms = rooms_for(p.threads, most_block_units(kernels, groups, left),
                           ceil_div(depth, kernels.step) * kernels.panel_columns);
    const auto parts = shares(groups, p.threads, [&](int64_t g) {
        const GroupedMM::Group& group = p.groups[size_t(g)];
        return group.rows == 0 ? 0 : ceil_div(group.columns, kernels.panel_columns);
    });
    take_turns(p.threads, int64_t(parts.size()),
               [&](int t, int64_t i) { one_share(p, kernels, parts[size_t(i)], rooms[size_t(t)]); });
    for (int64_t row = 0; row < p.tail.rows; ++row) {
        char* to = offset(p.out.data, p.tail.out + row * p.out.row_stride, p.dtype);
        std::fill_n(to, p.tail.columns * bytes_of(p.dtype), 0);
    }
}

}  // namespace longcat
