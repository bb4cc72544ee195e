#include "longcat/moe_plan.h"

#include <algorithm>
#include <limits>

#include "longcat/check.h"

namespace longcat {

void moe_plan(const MoePlan& p) {
    const int64_t total = p.tokens * p.slots;
    LC_CHECK(total <= std::numeric_limits<int32_t>::max(), "moe_plan: ids must have fewer than 2^31 elements");
    std::fill(p.offsets, p.offsets + p.experts + 1, 0);
    const auto has_row = [&](int64_t id) { return id >= 0 && id < p.experts; };
    for (int64_t s = 0; s < total; ++s)
        if (has_row(p.ids[s])) ++p.offsets[p.ids[s] + 1];
    for (int64_t e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
    std::vector<int32_t> next(p.offsets, p.offsets + p.experts);
    for (int64_t token = 0, s = 0; token < p.tokens; ++token)
        for (const int64_t end = s + p.slots; s < end; ++s) {
            const int32_t row = has_row(p.ids[s]) ? next[size_t(p.ids[s])]++ : -1;
            p.row[s] = row;
            if (row < 0) continue;
            p.slot[row] = int32_t(s);
            p.token[row] = int32_t(token);
        }
    std::fill(p.slot + p.offsets[p.experts], p.slot + total, -1);
    std::fill(p.token + p.offsets[p.experts], p.token + total, -1);
}

void moe_tiles(const int32_t* offsets, int64_t experts, int64_t height, int64_t count, int32_t* tiles) {
    int32_t* out = tiles;
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t row = offsets[e]; row < offsets[e + 1]; row += height) {
            *out++ = int32_t(e);
            *out++ = int32_t(row);
        }
    std::fill(out, tiles + 2 * count, -1);
}

RoutingPlan::RoutingPlan(const int64_t* ids, int64_t tokens, int64_t slots, int64_t experts)
    : offsets(size_t(experts + 1)), token(size_t(tokens * slots)), slot(token.size()), row(token.size()) {
    moe_plan({tokens, slots, experts, ids, offsets.data(), token.data(), slot.data(), row.data()});
}

}  // namespace longcat
