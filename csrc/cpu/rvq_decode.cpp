#include "longcat/rvq_decode.h"

#include <algorithm>

namespace longcat {
namespace {

// The row numbers of each code of one level, ascending: those of k are order[starts[k]] to order[starts[k + 1]].
struct Groups {
    std::vector<int64_t> starts, order;

    Groups(const CodesView& codes, int64_t level, int64_t entries) : starts(size_t(entries) + 1) {
        for (int64_t t = 0; t < codes.rows; ++t) {
            const int64_t code = codes.at(t, level);
            LC_CHECK(code < entries, "rvq_decode_backward: codes must be below the number of entries");
            if (code >= 0) ++starts[size_t(code) + 1];
        }
        for (size_t k = 0; k < size_t(entries); ++k) starts[k + 1] += starts[k];
        order.resize(size_t(starts.back()));
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t t = 0; t < codes.rows; ++t)
            if (codes.at(t, level) >= 0) order[size_t(next[size_t(codes.at(t, level))]++)] = t;
    }
};

void add(float* sum, const float* terms, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += terms[d];
}

void check_codes(const RvqDecode& p) {
    for (int64_t t = 0; t < p.codes.rows; ++t)
        for (int64_t l = 0; l < p.codes.levels; ++l)
            LC_CHECK(p.codes.at(t, l) < p.codebooks[size_t(l)].entries,
                     "rvq_decode: codes must be below the number of entries");
}

}  // namespace

void rvq_decode(const RvqDecode& p) {
    check_codes(p);
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t t = 0; t < p.codes.rows; ++t) {
        float* out = p.out + t * p.dim;
        std::fill(out, out + p.dim, 0.0f);
        for (int64_t l = 0; l < p.codes.levels; ++l) {
            const RvqDecode::Codebook& book = p.codebooks[size_t(l)];
            const int64_t code = p.codes.at(t, l);
            if (code >= 0) add(out, book.words + code * book.stride, p.dim);
        }
    }
}

void rvq_decode_backward(const RvqDecodeBackward& p) {
    for (int64_t l = 0; l < p.codes.levels; ++l) {
        const RvqDecodeBackward::Gradient& gradient = p.gradients[size_t(l)];
        const Groups groups(p.codes, l, gradient.entries);
#pragma omp parallel for schedule(dynamic, 64) num_threads(p.threads)
        for (int64_t k = 0; k < gradient.entries; ++k)
            for (int64_t i = groups.starts[size_t(k)]; i < groups.starts[size_t(k) + 1]; ++i)
                add(gradient.words + k * p.dim, p.grad + groups.order[size_t(i)] * p.row_stride, p.dim);
    }
}

}  // namespace longcat
