#include "longcat/rvq_encode_backward.h"

#include <algorithm>

namespace longcat {
namespace {

// One row as floats.
template <class T>
void load(const RvqEncodeBackward::Matrix& from, int64_t row, int64_t dim, float* out) {
    const T* data = static_cast<const T*>(from.data) + row * from.row_stride;
    if (from.column_stride == 1) {
        for (int64_t d = 0; d < dim; ++d) out[d] = to_float(data[d]);
    } else {
        for (int64_t d = 0; d < dim; ++d) out[d] = to_float(data[d * from.column_stride]);
    }
}

// Takes the codeword off the residual and adds what the level's loss gives to the gradient.
template <class Residual>
void walk_level(const float* word, float scale, int64_t dim, float* residual, float* total) {
    for (int64_t d = 0; d < dim; ++d) {
        residual[d] = round_to<Residual>(residual[d] - word[d]);
        total[d] += scale * residual[d];
    }
}

// `residual` and `total` hold one row each.
template <class T, class Residual>
void one_row(const RvqEncodeBackward& p, int64_t row, float* residual, float* total) {
    const int64_t* codes = p.codes + row * int64_t(p.codebooks.size());
    T* out = static_cast<T*>(p.grad_x) + row * p.dim;
    std::fill(total, total + p.dim, 0.0f);
    const bool counts = codes[0] >= 0;
    if (counts && p.grad.data) load<T>(p.grad, row, p.dim, total);
    if (counts && p.scales) {
        load<T>(p.x, row, p.dim, residual);
        for (int64_t d = 0; d < p.dim; ++d) residual[d] = round_to<Residual>(residual[d]);
        for (size_t l = 0; l < p.codebooks.size(); ++l) {
            const Codebook& book = p.codebooks[l];
            walk_level<Residual>(book.words + codes[l] * book.stride, p.scales[l], p.dim, residual, total);
        }
    }
    for (int64_t d = 0; d < p.dim; ++d) out[d] = from_float<T>(total[d]);
}

void check_codes(const RvqEncodeBackward& p) {
    for (int64_t t = 0; t < p.rows; ++t) {
        const int64_t* codes = p.codes + t * int64_t(p.codebooks.size());
        for (size_t l = 0; l < p.codebooks.size(); ++l)
            LC_CHECK(codes[0] < 0 || (codes[l] >= 0 && codes[l] < p.codebooks[l].entries),
                     "rvq_encode_backward: codes must name entries, or be negative from the first level on");
    }
}

template <class T, class Residual>
void all_rows(const RvqEncodeBackward& p) {
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> residual(size_t(p.dim)), total(size_t(p.dim));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) one_row<T, Residual>(p, row, residual.data(), total.data());
    }
}

}  // namespace

void rvq_encode_backward(const RvqEncodeBackward& p) {
    check_codes(p);
    dispatch_float(p.dtype, "rvq_encode_backward: x", [&](auto element) {
        dispatch_float(p.residual_dtype, "rvq_encode_backward: residual_dtype",
                       [&](auto residual) { all_rows<decltype(element), decltype(residual)>(p); });
    });
}

}  // namespace longcat
