#include "depth_frame.h"

namespace longcat {
namespace {

int64_t pitch_of(const DepthKernels& kernels, int64_t elements) {
    return odd_pitch(ceil_div(ceil_div(elements, 2) * 2, kernels.step)) * 4;
}

}  // namespace

std::vector<DepthRow> active_rows(const DepthDecode& p) {
    std::vector<DepthRow> rows;
    std::vector<int64_t> place(size_t(p.rows), -1);
    const auto leader_of = [&](int64_t row) { return p.leaders == nullptr ? row : p.leaders[row]; };
    for (int64_t row = 0; row < p.rows; ++row) {
        if (p.active != nullptr && !p.active[leader_of(row)]) continue;
        place[size_t(row)] = int64_t(rows.size());
        rows.push_back({row, 0, -1, p.shape.ends});
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i].leader = place[size_t(leader_of(rows[i].row))];
        if (rows[i].leader != int64_t(i)) rows[size_t(rows[i].leader)].follower = int64_t(i);
    }
    return rows;
}

void DepthMemory::lay_out(Arena& arena, const DepthDecode& p, const DepthKernels& kernels, int64_t rows) {
    const DepthShape& s = p.shape;
    const int64_t queries = s.heads * s.head_dim, cached = s.layers * rows * s.levels * s.kv_heads * s.head_dim;
    hidden_pitch = pitch_of(kernels, s.hidden), dim_pitch = pitch_of(kernels, s.dim);
    mixed_pitch = pitch_of(kernels, queries), act_pitch = pitch_of(kernels, s.ffn);
    logits_pitch = *std::max_element(s.classes, s.classes + s.levels) + 64;
    vectors = arena.take<float>(p.packed == nullptr ? vector_floats(s, *p.weights) : 0);
    hidden = arena.take<float>(rows * s.hidden);
    input = arena.take<float>(rows * s.table_width()), total = arena.take<float>(rows * s.table_width());
    z = arena.take<float>(rows * s.dim), q = arena.take<float>(rows * queries);
    keys = arena.take<float>(cached), values = arena.take<float>(cached);
    mixed = arena.take<char>(rows * mixed_pitch), act = arena.take<char>(rows * act_pitch);
    logits = arena.take<float>(rows * logits_pitch);
}

void DepthDesk::lay_out(Arena& arena, const DepthDecode& p, const DepthKernels& kernels, const DepthMemory& memory,
                        int64_t rows) {
    wide = arena.take<char>(rows * memory.hidden_pitch), narrow = arena.take<char>(rows * memory.dim_pitch);
    worker.sums = arena.take<float>(rows * 2 * kernels.half_columns);
    worker.half = arena.take<uint32_t>(kChunkBytes / 4);
    head = arena.take<float>(p.shape.head_dim), draw = arena.take<float>(draw_room(memory.logits_pitch));
}

}  // namespace longcat
