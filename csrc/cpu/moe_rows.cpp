#include "moe_rows.h"

namespace longcat {
namespace {

// Columns [first, first + count) of one token.
void combine_token(const GemmKernels& kernels, const MoeProduct& p, int64_t token, int64_t first, int64_t count,
                   const float* y, int64_t pitch, float* sum) {
    const DType dtype = p.self.dtype;
    const auto part = [&](const Lines& lines) {
        return static_cast<const char*>(lines.data) + (token * lines.stride + first) * bytes_of(dtype);
    };
    std::fill(sum, sum + count, 0.0f);
    float identity = 0;
    bool has_identity = false;
    const int64_t total = p.tokens * p.slots;
    for (int64_t slot = token * p.slots; slot < (token + 1) * p.slots; ++slot) {
        if (p.ids[slot] >= p.experts) identity += p.weights[slot], has_identity = true;
        const int32_t row = p.plan.row[size_t(slot)], next = slot + 1 < total ? p.plan.row[size_t(slot) + 1] : -1;
        for (int64_t j = 0; next >= 0 && j < count; j += 16) __builtin_prefetch(y + next * pitch + j);
        if (row < 0) continue;
        kernels.add_scaled(y + row * pitch, DType::float32, p.weighted ? p.weights[slot] : 1.0f, count, sum);
    }
    if (has_identity) kernels.add_scaled(part(p.self), dtype, identity, count, sum);
    if (p.residual.data != nullptr) kernels.add_scaled(part(p.residual), dtype, 1.0f, count, sum);
    char* out = static_cast<char*>(p.out) + (token * p.dim + first) * bytes_of(dtype);
    kernels.store(sum, count, 1, count, out, dtype, count, false);
}

}  // namespace

void combine(const GemmKernels& kernels, const MoeProduct& p, int64_t first, int64_t last, const float* y,
             int64_t pitch) {
    constexpr int64_t kTokens = 16;
    std::vector<Buffer<float>> sums;
    for (int t = 0; t < p.threads; ++t) sums.emplace_back(last - first);
    take_turns(p.threads, ceil_div(p.tokens, kTokens), [&](int t, int64_t i) {
        const int64_t end = std::min(p.tokens, (i + 1) * kTokens);
        for (int64_t token = i * kTokens; token < end; ++token)
            combine_token(kernels, p, token, first, last - first, y, pitch, sums[size_t(t)].data());
    });
}

std::vector<float> row_weights(const RoutingPlan& plan, const float* weights) {
    std::vector<float> result(size_t(plan.rows()));
    for (size_t row = 0; row < result.size(); ++row) result[row] = weights[plan.slot[row]];
    return result;
}

}  // namespace longcat
