// Where the rows of each expert come from: a stable counting sort of slots by expert.
//
// Row r of expert e is the r - offsets[e]-th slot whose id is e; ids outside [0, experts) have no row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace longcat {

struct MoePlan {
    int64_t tokens, slots, experts;  // slots of a token
    const int64_t* ids;              // [tokens, slots]

    int32_t* offsets;  // [experts + 1]
    int32_t* token;    // [tokens * slots] of each row; -1 past the last
    int32_t* slot;     // [tokens * slots] flat slot of each row; -1 past the last
    int32_t* row;      // [tokens, slots] of each slot; -1 where it has none
};

void moe_plan(const MoePlan& p);

// Tiles of `height` rows that cover each expert's: tiles[i] = (expert, first row), and (-1, -1) up to `count`.
void moe_tiles(const int32_t* offsets, int64_t experts, int64_t height, int64_t count, int32_t* tiles);

// A plan with memory of its own.
struct RoutingPlan {
    std::vector<int32_t> offsets, token, slot, row;
    RoutingPlan(const int64_t* ids, int64_t tokens, int64_t slots, int64_t experts);
    int64_t rows() const { return offsets.back(); }
    int64_t rows_of(int64_t expert) const { return offsets[size_t(expert) + 1] - offsets[size_t(expert)]; }
};

}  // namespace longcat
