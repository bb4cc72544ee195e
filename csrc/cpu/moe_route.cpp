#include "longcat/moe_route.h"

namespace longcat {
namespace {

// The `slots` best of one token, by insertion: few of many experts get that far.
void choose(const float* choice, int64_t experts, int64_t slots, int64_t* ids) {
    const auto better = [](float a, float b) { return a > b || (a != a && b == b); };
    int64_t held = 0;
    for (int64_t e = 0; e < experts; ++e) {
        if (held == slots && !better(choice[e], choice[ids[held - 1]])) continue;
        int64_t at = held < slots ? held++ : slots - 1;
        for (; at > 0 && better(choice[e], choice[ids[at - 1]]); --at) ids[at] = ids[at - 1];
        ids[at] = e;
    }
}

void one_token(const MoeRoute& p, int64_t token) {
    const float* scores = p.scores + token * p.experts;
    int64_t* ids = p.ids + token * p.slots;
    float *weights = p.weights + token * p.slots, sum = 0;
    choose(p.choice + token * p.experts, p.experts, p.slots, ids);
    for (int64_t j = 0; j < p.slots; ++j) sum += scores[ids[j]];
    for (int64_t j = 0; j < p.slots; ++j) weights[j] = (p.renorm ? scores[ids[j]] / sum : scores[ids[j]]) * p.scale;
}

}  // namespace

void moe_route(const MoeRoute& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t token = 0; token < p.tokens; ++token) one_token(p, token);
}

}  // namespace longcat
