#include "rvq_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "longcat/dtypes.h"

#if LC_X86
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#if defined(__clang__)
#define LC_SHUFFLE(Type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LC_SHUFFLE(Type, a, b, ...) __builtin_shuffle(a, b, Type{__VA_ARGS__})
#endif

namespace longcat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kUnit = 0x1p-24;
constexpr float kTiny = 0x1p-126f;  // elements below are taken as zero, as products may

// Not below `value`, which double arithmetic gave, and not above it by more than 5 u.
float up(double value) { return float(value + std::fabs(value) * 0x1p-22 + 0x1p-126); }

// g of rvq_kernels.h for `dim` products and the start.
double accumulation(int64_t dim) {
    const double n = double(dim + 2) * kUnit;
    return n / (1 - n);
}

// From float32 sums of squares, each in 16 lanes: of r, of rho^ and of rho's rounding to its element.
RowBounds row_bounds(double all, double kept, double lost, int64_t dim) {
    const double grown = 1 + double(dim + 32) * kUnit, g = accumulation(dim), tiny = std::sqrt(double(dim)) * 0x1p-60;
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
void describe_word(const PackedCodebook& packed, int64_t k, double whole, double lost) {
    const double grown = 1 + double(packed.dim + 32) * kUnit, tiny = std::sqrt(double(packed.dim)) * 0x1p-60;
    const double length = std::sqrt(whole * grown) + tiny;
    const double slack = (accumulation(packed.dim) + (grown - 1) + 64 * kUnit) * 0.5 * whole * grown +
                         double(packed.dim) * 0x1p-120 + 0x1p-46 * packed.norm[k];
    const bool usable = std::isfinite(packed.norm[k]);
    packed.slack[k] = usable ? up(slack) : 0.0f;
    packed.start[k] = usable ? up(slack - 0.5 * whole) : -kInfinity;
    const bool too_long = !(packed.norm[k] < kLongest * kLongest);  // slack and products of whole words could overflow
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
    return row_bounds(packed.norm[j], packed.norm[j], 0, packed.dim);
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

struct Lanes {
    static constexpr int kWidth = 4;
    typedef float Vector __attribute__((vector_size(16), aligned(4)));
    Vector v;
    static Lanes load(const float* p) { return {*reinterpret_cast<const Vector*>(p)}; }
    static Lanes load_units(const uint32_t* p) {
        Lanes lanes;
        std::memcpy(&lanes.v, p, sizeof lanes.v);
        return lanes;
    }
    static Lanes splat(float x) { return {Vector{x, x, x, x}}; }
    static Lanes splat_unit(const uint32_t* p) { return splat(float_of(*p)); }
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const auto normal = (a.v >= kTiny) | (a.v <= -kTiny);
        const Lanes element = {normal ? a.v : a.v * 0.0f};
        std::memcpy(out, &element.v, sizeof element.v);
        return element;
    }
    static Lanes multiply(Lanes a, Lanes b) { return {a.v * b.v}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {a.v * b.v + c.v}; }
    static Lanes add(Lanes a, Lanes b) { return {a.v + b.v}; }
    static Lanes subtract(Lanes a, Lanes b) { return {a.v - b.v}; }
    static Lanes larger(Lanes a, Lanes b) { return {a.v > b.v ? a.v : b.v}; }
    static uint32_t not_below(Lanes a, Lanes b) {
        const auto met = a.v >= b.v;
        return (uint32_t(met[0]) & 1) | (uint32_t(met[1]) & 2) | (uint32_t(met[2]) & 4) | (uint32_t(met[3]) & 8);
    }
    float largest() const { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
    float total() const { return (v[0] + v[2]) + (v[1] + v[3]); }
    void store(float* p) const { *reinterpret_cast<Vector*>(p) = v; }
};
constexpr int kTileRows = 6, kStep = 1;
extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

struct Lanes {
    static constexpr int kWidth = 8;
    __m256 v;
    static Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Lanes load_units(const uint32_t* p) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))}; }
    static Lanes splat(float x) { return {_mm256_set1_ps(x)}; }
    static Lanes splat_unit(const uint32_t* p) { return {_mm256_broadcast_ss(reinterpret_cast<const float*>(p))}; }
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
        const __m256 element = _mm256_and_ps(a.v, _mm256_cmp_ps(size, _mm256_set1_ps(kTiny), _CMP_GE_OQ));
        _mm256_storeu_ps(reinterpret_cast<float*>(out), element);
        return {element};
    }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Lanes subtract(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
    static uint32_t not_below(Lanes a, Lanes b) {
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
    }
    float largest() const {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    float total() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
};
constexpr int kTileRows = 6, kStep = 1;
extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

struct Lanes {
    static constexpr int kWidth = 16;
    __m512 v;
    static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes load_units(const uint32_t* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
    static Lanes splat_unit(const uint32_t* p) { return splat(float_of(*p)); }
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const __mmask16 normal = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(kTiny), _CMP_GE_OQ);
        const __m512 element = _mm512_maskz_mov_ps(normal, a.v);
        _mm512_storeu_ps(out, element);
        return {element};
    }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
    static uint32_t not_below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
    float largest() const { return _mm512_reduce_max_ps(v); }
    float total() const { return _mm512_reduce_add_ps(v); }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
constexpr int kTileRows = 12, kStep = 1;
extern const RvqKernels kKernels;
#include "rvq_kernels_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

struct Lanes {
    static constexpr int kWidth = 16;
    __m512 v;
    static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes load_units(const uint32_t* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
    static Lanes splat_unit(const uint32_t* p) { return splat(float_of(*p)); }
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const __mmask16 normal = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(kTiny), _CMP_GE_OQ);
        const __m256i element = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(normal, a.v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), element);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(element), 16))};
    }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    // Of pairs of bfloat16: two products a lane.
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
    }
    static Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
    static uint32_t not_below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
    float largest() const { return _mm512_reduce_max_ps(v); }
    float total() const { return _mm512_reduce_add_ps(v); }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
constexpr int kTileRows = 12, kStep = 2;
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
