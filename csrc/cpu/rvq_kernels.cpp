#include "rvq_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"
#include "longcat/dtypes.h"

#if defined(__clang__)
#define LC_SHUFFLE(Type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LC_SHUFFLE(Type, a, b, ...) __builtin_shuffle(a, b, Type{__VA_ARGS__})
#endif

namespace longcat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kUnit = 0x1p-24;

// Not below `value`, which double arithmetic gave, and not above it by more than 5 u.
float up(double value) { return float(value + std::fabs(value) * 0x1p-22 + 0x1p-126); }

// g of rvq_kernels.h for `dim` products and the start, in runs.
double accumulation(int64_t dim, int64_t run) {
    const double n = double(std::min(dim, run) + (dim + run - 1) / run + 1) * kUnit;
    return n / (1 - n);
}

// From float32 sums of squares, each in 16 lanes: of r, of rho^ and of rho's rounding to its element.
RowBounds row_bounds(double all, double kept, double lost, int64_t dim, int64_t run) {
    const double grown = 1 + double(dim + 32) * kUnit, g = accumulation(dim, run),
                 tiny = std::sqrt(double(dim)) * 0x1p-60;
    const double norm = std::sqrt(all * grown) + tiny, length = std::sqrt(kept * grown) + tiny;
    const double lost_length = std::sqrt(lost * grown) + tiny;
    const double error = lost_length + kUnit * (length + lost_length);  // the rounding of r - m comes on top
    RowBounds bounds{};
    bounds.finite = true;
    bounds.exhaustive = !(norm < kLongest && length < kLongest);
    bounds.by_length = up(error + (g + 64 * kUnit) * length);
    bounds.by_error = up((1 + g) * length);
    bounds.margin = up(0x1p-45 * norm * norm);
    return bounds;
}

// Writes what the bound takes from codeword k, given float32 sums of squares of d and of its rounding to d^, which err
// by (D + 32) u at most.
void describe_word(const PackedCodebook& packed, int64_t k, double whole, double lost, int64_t run) {
    const double grown = 1 + double(packed.dim + 32) * kUnit, tiny = std::sqrt(double(packed.dim)) * 0x1p-60;
    const double length = std::sqrt(whole * grown) + tiny;
    const double slack = (accumulation(packed.dim, run) + (grown - 1) + 64 * kUnit) * 0.5 * whole * grown +
                         double(packed.dim) * 0x1p-120 + 0x1p-46 * packed.norm[k];
    const bool usable = std::isfinite(packed.norm[k]);
    packed.slack[k] = usable ? up(slack) : 0.0f;
    packed.start[k] = usable ? up(slack - 0.5 * whole) : -kInfinity;
    // Slack and products of whole words could overflow, or sums of so many products err without bound.
    const bool too_long = !(packed.norm[k] < kLongest * kLongest) || packed.dim > kMostScreened;
    packed.length[k] = usable ? (too_long ? kInfinity : up(length)) : 0.0f;
    packed.error[k] = usable ? up(std::sqrt(lost * grown) + kUnit * length + tiny) : 0.0f;
}

double norm_of(const Part& part, const RvqKernels& kernels, int64_t k) {
    const int64_t local = k - part.offset;
    if (local >= 0 && local < part.packed.entries) return part.packed.norm[local];
    const float* word = part.book.words + k * part.book.stride;
    return kernels.tree_dot(word, word, part.packed.dim, part.terms);
}

void take_nearer(Candidates& found, const RvqKernels& kernels, const Part& part, const float* row, int64_t k) {
    const double norm = norm_of(part, kernels, k);
    const float* word = part.book.words + k * part.book.stride;
    const double score = norm - 2 * kernels.tree_dot(row, word, part.packed.dim, part.terms);
    // Earlier words may come late: those that the screen held while a later part was scored exhaustively.
    if (found.best >= 0 && !(score < found.score || (score == found.score && k < found.best))) return;
    found.best = k;
    found.score = score;
}

}  // namespace

RowBounds word_bounds(const PackedCodebook& packed, int64_t j) {
    return row_bounds(packed.norm[j], packed.norm[j], 0, packed.dim, rvq_kernels(packed.isa).run);
}

int drop_losers(Candidates& found, float bound) {
    int kept = 0;
    for (int i = 0; i < found.count; ++i) {
        if (found.high[i] < bound) continue;
        found.word[kept] = found.word[i];
        found.high[kept++] = found.high[i];
    }
    return found.count = kept;
}

void resolve(Candidates& found, float bound, const RvqKernels& kernels, const Part& part, const float* row) {
    drop_losers(found, bound);
    for (int i = 0; i < found.count; ++i) take_nearer(found, kernels, part, row, found.word[i]);
    found.count = 0;
}

void resolve_all(Candidates& found, const RvqKernels& kernels, const Part& part, const float* row) {
    for (int64_t k = 0; k < part.packed.entries; ++k)
        if (std::isfinite(part.packed.norm[k])) take_nearer(found, kernels, part, row, part.offset + k);
}

namespace portable {
namespace {

extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

const RvqKernels& rvq_kernels(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512_bf16) return avx512_bf16::kKernels;
    if (isa == Isa::avx512) return avx512::kKernels;
    if (isa == Isa::avx2) return avx2::kKernels;
#endif
    (void)isa;
    return portable::kKernels;
}

}  // namespace longcat
