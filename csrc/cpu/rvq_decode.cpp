#include "longcat/rvq_decode.h"

#include <algorithm>
#include <string>
#include <vector>

#include "lanes.h"
#include "segments.h"

namespace longcat {
namespace {

constexpr int64_t kRun = 64;   // rows that one thread writes in turn
constexpr int64_t kAhead = 8;  // words

}  // namespace
}  // namespace longcat

#define LC_BODY "rvq_decode_body.h"
#include "each_isa.h"

namespace longcat {
namespace {

using SumWords = void (*)(const float* const*, const float* const*, int64_t, float*);

SumWords sum_words_for(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512 || isa == Isa::avx512_bf16) return avx512::sum_words;
    if (isa == Isa::avx2) return avx2::sum_words;
#endif
    (void)isa;
    return portable::sum_words;
}

// The codewords of some rows, one row after another.
struct Words {
    std::vector<const float*> words;
    std::vector<size_t> starts;

    void find(const RvqDecode& p, int64_t first, int64_t last) {
        words.clear(), starts.assign(1, 0);
        for (int64_t t = first; t < last; ++t) {
            for (int64_t l = 0; l < p.codes.levels; ++l) {
                const Codebook& book = p.codebooks[size_t(l)];
                const int64_t code = p.codes.at(t, l);
                if (code >= 0) words.push_back(book.words + code * book.stride);
            }
            starts.push_back(words.size());
        }
        // Past the last word some word must stand, for whoever looks ahead.
        words.insert(words.end(), size_t(kAhead), p.codebooks[0].words);
    }
};

void check_codes(const RvqDecode& p) {
    for (int64_t l = 0; l < p.codes.levels; ++l) {
        int64_t largest = -1;
        for (int64_t t = 0; t < p.codes.rows; ++t) largest = std::max(largest, p.codes.at(t, l));
        const int64_t entries = p.codebooks[size_t(l)].entries;
        LC_CHECK(largest < entries, "rvq_decode: codes must be below " + std::to_string(entries) + " at level " +
                                        std::to_string(l) + ", got " + std::to_string(largest));
    }
}

void add(float* sum, const float* terms, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += terms[d];
}

}  // namespace

void rvq_decode(const RvqDecode& p) {
    check_codes(p);
    const SumWords sum_words = sum_words_for(p.isa);
#pragma omp parallel num_threads(p.threads)
    {
        Words run;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < p.codes.rows; first += kRun) {
            const int64_t last = std::min(first + kRun, p.codes.rows);
            run.find(p, first, last);
            const float* const* words = run.words.data();
            for (int64_t t = first; t < last; ++t)
                sum_words(words + run.starts[size_t(t - first)], words + run.starts[size_t(t - first) + 1], p.dim,
                          p.out + t * p.dim);
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
