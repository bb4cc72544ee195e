#include "longcat/rvq_decode.h"

#include <algorithm>

#include "segments.h"

namespace longcat {
namespace {

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
            const Codebook& book = p.codebooks[size_t(l)];
            const int64_t code = p.codes.at(t, l);
            if (code >= 0) add(out, book.words + code * book.stride, p.dim);
        }
    }
}

void rvq_decode_backward(const RvqDecodeBackward& p) {
    for (int64_t l = 0; l < p.codes.levels; ++l) {
        const RvqDecodeBackward::Gradient& gradient = p.gradients[size_t(l)];
        const Segments rows("rvq_decode_backward: codes", p.codes.data + l * p.codes.level_stride, p.codes.row_stride,
                            p.codes.rows, gradient.entries);
#pragma omp parallel for schedule(dynamic, 64) num_threads(p.threads)
        for (int64_t k = 0; k < gradient.entries; ++k)
            for (const int64_t* row = rows.begin(k); row != rows.end(k); ++row)
                add(gradient.words + k * p.dim, p.grad + *row * p.row_stride, p.dim);
    }
}

}  // namespace longcat
