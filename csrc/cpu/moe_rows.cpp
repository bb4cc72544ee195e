#include "moe_rows.h"

namespace longcat {
namespace {

// One thread's memory for the sum of a token: its rows and their weights.
struct Terms {
    std::vector<const float*> lines;
    std::vector<float> scales;
    Buffer<float> sum;
    Terms(int64_t slots, int64_t columns) : lines(size_t(slots)), scales(size_t(slots)), sum(columns) {}
};

// Columns [first, first + count) of one token.
void combine_token(const GemmKernels& kernels, const MoeProduct& p, int64_t token, int64_t first, int64_t count,
                   const float* y, int64_t pitch, Terms& terms) {
    const DType dtype = p.self.dtype;
    const auto part = [&](const Lines& lines) {
        return static_cast<const char*>(lines.data) + (token * lines.stride + first) * bytes_of(dtype);
    };
    float identity = 0, *sum = terms.sum.data();
    bool has_identity = false;
    size_t used = 0;
    for (int64_t slot = token * p.slots; slot < (token + 1) * p.slots; ++slot) {
        const int32_t row = p.plan.row[size_t(slot)];
        if (row >= 0) {
            terms.lines[used] = y + row * pitch;
            terms.scales[used++] = p.weighted ? p.weights[slot] : 1.0f;
        } else if (p.ids[slot] >= p.experts) {
            identity += p.weights[slot], has_identity = true;
        }
    }
    kernels.weighted_sum(terms.lines.data(), terms.scales.data(), int64_t(used), count, sum);
    if (has_identity) kernels.add_scaled(part(p.self), dtype, identity, count, sum);
    if (p.residual.data != nullptr) kernels.add_scaled(part(p.residual), dtype, 1.0f, count, sum);
    char* out = static_cast<char*>(p.out) + (token * p.dim + first) * bytes_of(dtype);
    kernels.store(sum, count, 1, count, out, dtype, count, false);
}

// Asks the caches for the rows of a token.
void fetch(const MoeProduct& p, int64_t token, int64_t count, const float* y, int64_t pitch) {
    for (int64_t slot = token * p.slots; slot < (token + 1) * p.slots; ++slot) {
        const int32_t row = p.plan.row[size_t(slot)];
        for (int64_t j = 0; row >= 0 && j < count; j += 16) __builtin_prefetch(y + row * pitch + j);
    }
}

}  // namespace

void combine(const GemmKernels& kernels, const MoeProduct& p, int64_t first, int64_t last, const float* y,
             int64_t pitch) {
    constexpr int64_t kTokens = 16;
    std::vector<Terms> terms;
    for (int t = 0; t < p.threads; ++t) terms.emplace_back(p.slots, last - first);
    take_turns(p.threads, ceil_div(p.tokens, kTokens), [&](int t, int64_t i) {
        const int64_t end = std::min(p.tokens, (i + 1) * kTokens);
        for (int64_t token = i * kTokens; token < end; ++token) {
            if (token + 1 < p.tokens) fetch(p, token + 1, last - first, y, pitch);
            combine_token(kernels, p, token, first, last - first, y, pitch, terms[size_t(t)]);
        }
    });
}

std::vector<float> row_weights(const RoutingPlan& plan, const float* weights) {
    std::vector<float> result(size_t(plan.rows()));
    for (size_t row = 0; row < result.size(); ++row) result[row] = weights[plan.slot[row]];
    return result;
}

}  // namespace longcat
