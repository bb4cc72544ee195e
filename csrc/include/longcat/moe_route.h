// The k best experts of each token: the highest `choice`, NaN above all, ties to the lower id; highest first.
//
//     weights[t, j] = scale * scores[t, ids[t, j]], with `renorm` divided by their sum over j
#pragma once

#include <cstdint>

namespace longcat {

struct MoeRoute {
    int64_t tokens, experts, slots;
    const float* scores;  // [tokens, experts]
    const float* choice;  // [tokens, experts]
    bool renorm;
    float scale;
    int threads;

    float* weights;  // [tokens, slots]
    int64_t* ids;    // [tokens, slots]
};

void moe_route(const MoeRoute& p);

}  // namespace longcat
