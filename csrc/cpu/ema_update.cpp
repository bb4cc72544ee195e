#include "longcat/ema_update.h"

#include <algorithm>
#include <vector>

namespace longcat {
namespace {

uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Rows grouped by code: those of entry k are order[starts[k]] to order[starts[k + 1]], in the order of their number.
struct Groups {
    std::vector<int64_t> starts, order;

    explicit Groups(const EmaUpdate& p) : starts(size_t(p.entries) + 1) {
        for (int64_t i = 0; i < p.rows; ++i) {
            LC_CHECK(p.codes[i] < p.entries, "ema_update: codes must be below the number of entries");
            if (p.codes[i] >= 0) ++starts[size_t(p.codes[i]) + 1];
        }
        for (size_t k = 0; k < size_t(p.entries); ++k) starts[k + 1] += starts[k];
        order.resize(size_t(starts.back()));
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < p.rows; ++i)
            if (p.codes[i] >= 0) order[size_t(next[size_t(p.codes[i])]++)] = i;
    }
};

// Row numbers in the order in which restarted entries take them, the first `count` of it.
std::vector<int64_t> restart_rows(const EmaUpdate& p, size_t count) {
    const auto seed = uint64_t(p.seed);
    const uint32_t key = mix(mix(uint32_t(seed)) ^ uint32_t(seed >> 32) ^ 0x9e3779b9u);
    std::vector<std::pair<uint32_t, int64_t>> keyed;
    for (int64_t i = 0; i < p.rows; ++i)
        if (p.codes[i] >= 0) keyed.emplace_back(mix(mix(uint32_t(i)) ^ key), i);
    count = std::min(count, keyed.size());
    std::partial_sort(keyed.begin(), keyed.begin() + int64_t(count), keyed.end());
    std::vector<int64_t> rows(count);
    for (size_t i = 0; i < count; ++i) rows[i] = keyed[i].second;
    return rows;
}

// Moves both sums of entry k; `sum` is one row of doubles.
template <class T>
void move_entry(const EmaUpdate& p, const Groups& groups, int64_t k, double size, double* sum) {
    std::fill(sum, sum + p.dim, 0.0);
    for (int64_t i = groups.starts[size_t(k)]; i < groups.starts[size_t(k) + 1]; ++i) {
        const T* row = static_cast<const T*>(p.vectors) + groups.order[size_t(i)] * p.row_stride;
        for (int64_t d = 0; d < p.dim; ++d) sum[d] += double(to_float(row[d]));
    }
    float *embed = p.embed + k * p.dim, *ema = p.embed_ema + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
        ema[d] = float(p.decay * double(ema[d]) + (1 - p.decay) * sum[d]);
        if (size > 0) embed[d] = float(double(ema[d]) / size);
    }
}

template <class T>
void restart_entry(const EmaUpdate& p, int64_t k, int64_t row, double count) {
    const T* vector = static_cast<const T*>(p.vectors) + row * p.row_stride;
    for (int64_t d = 0; d < p.dim; ++d) {
        p.embed[k * p.dim + d] = to_float(vector[d]);
        p.embed_ema[k * p.dim + d] = float(double(to_float(vector[d])) * count);
    }
    p.cluster_size_ema[k] = float(count);
}

// Moves the counts; gives their sum.
double move_counts(const EmaUpdate& p, const Groups& groups) {
    double total = 0;
    for (int64_t k = 0; k < p.entries; ++k) {
        const double count = double(groups.starts[size_t(k) + 1] - groups.starts[size_t(k)]);
        float& size = p.cluster_size_ema[k];
        size = float(p.decay * double(size) + (1 - p.decay) * count);
        total += double(size);
    }
    return total;
}

}  // namespace

int64_t ema_update(const EmaUpdate& p) {
    const Groups groups(p);
    const double total = move_counts(p, groups), smoothed = total + double(p.entries) * p.eps;
    const double mean = total / double(p.entries);
    const double threshold = std::max(p.restart_threshold, p.restart_fraction * mean);
    const double count = p.restart_count > 0 ? p.restart_count : double(float(mean));
    std::vector<int64_t> restarted;
    for (int64_t k = 0; k < p.entries && !groups.order.empty(); ++k)
        if (double(p.cluster_size_ema[k]) < threshold) restarted.push_back(k);
    const std::vector<int64_t> rows = restart_rows(p, restarted.size());
    dispatch_float(p.dtype, "ema_update: vectors", [&](auto type) {
        using T = decltype(type);
#pragma omp parallel num_threads(p.threads)
        {
            std::vector<double> sum(size_t(p.dim));
#pragma omp for schedule(dynamic, 16)
            for (int64_t k = 0; k < p.entries; ++k)
                move_entry<T>(p, groups, k, total * (double(p.cluster_size_ema[k]) + p.eps) / smoothed, sum.data());
        }
        for (size_t i = 0; i < restarted.size(); ++i) restart_entry<T>(p, restarted[i], rows[i % rows.size()], count);
    });
    return int64_t(restarted.size());
}

}  // namespace longcat
