// A register of floats for each instruction set, or of the elements that products are made of there: a unit of four
// bytes is one float, or two bfloat16, `first` and `second`. `kTileRows` rows by two registers are what the
// accumulators of a product hold.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

#if LC_X86
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace longcat {

constexpr float kTiny = 0x1p-126f;  // elements below are taken as zero, as products may

namespace portable {
namespace {

struct Lanes {
    static constexpr int kWidth = 4;
    typedef float Vector __attribute__((vector_size(16), aligned(4)));
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Vector v;
    static Lanes load(const float* p) { return {*reinterpret_cast<const Vector*>(p)}; }
    static Lanes load_units(const uint32_t* p) {
        Lanes lanes;
        std::memcpy(&lanes.v, p, sizeof lanes.v);
        return lanes;
    }
    static Lanes load_bytes(const int8_t* p) { return {Vector{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }
    Lanes first() const { return {(Vector)((Bits)v << 16)}; }
    Lanes second() const { return {(Vector)((Bits)v & 0xffff0000u)}; }
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
    static Lanes reciprocal(Lanes a) { return {1.0f / a.v}; }
    static Lanes larger(Lanes a, Lanes b) { return {a.v > b.v ? a.v : b.v}; }
    // 2^n for n = a - 1.5 * 2^23, a whole number in [-126, 127].
    static Lanes power_of_two(Lanes a) {
        typedef uint32_t Bits __attribute__((vector_size(16)));
        return {(Vector)(((Bits)a.v - (0x4b400000u - 127u)) << 23)};
    }
    static Lanes where_not_below(Lanes a, Lanes b, Lanes x) { return {(Vector)((Bits)(a.v >= b.v) & (Bits)x.v)}; }
    static uint32_t not_below(Lanes a, Lanes b) {
        const auto met = a.v >= b.v;
        return (uint32_t(met[0]) & 1) | (uint32_t(met[1]) & 2) | (uint32_t(met[2]) & 4) | (uint32_t(met[3]) & 8);
    }
    float largest() const { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
    float total() const { return (v[0] + v[2]) + (v[1] + v[3]); }
    void store(float* p) const { *reinterpret_cast<Vector*>(p) = v; }
    void store_units(uint32_t* p) const { std::memcpy(p, &v, sizeof v); }
};
constexpr int kTileRows = 6, kStep = 1;

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
    static Lanes load_bytes(const int8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
    Lanes first() const { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16))}; }
    Lanes second() const { return {_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))))}; }
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
    static Lanes reciprocal(Lanes a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }
    static Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Lanes power_of_two(Lanes a) {
        const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x4b400000 - 127));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(n, 23))};
    }
    static Lanes where_not_below(Lanes a, Lanes b, Lanes x) {
        return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ), x.v)};
    }
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
    void store_units(uint32_t* p) const { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
};
constexpr int kTileRows = 6, kStep = 1;

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

// What registers of both kinds of elements share; `Own` is one of them.
template <class Own>
struct Register {
    static constexpr int kWidth = 16;
    __m512 v;
    static Own load(const float* p) { return {{_mm512_loadu_ps(p)}}; }
    static Own load_units(const uint32_t* p) { return {{_mm512_loadu_ps(p)}}; }
    static Own load_bytes(const int8_t* p) {
        return {{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}};
    }
    Own first() const { return {{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16))}}; }
    Own second() const {
        return {{_mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(int(0xffff0000u))))}};
    }
    static Own splat(float x) { return {{_mm512_set1_ps(x)}}; }
    static Own splat_unit(const uint32_t* p) { return splat(float_of(*p)); }
    static Own multiply(Own a, Own b) { return {{_mm512_mul_ps(a.v, b.v)}}; }
    static Own add(Own a, Own b) { return {{_mm512_add_ps(a.v, b.v)}}; }
    static Own subtract(Own a, Own b) { return {{_mm512_sub_ps(a.v, b.v)}}; }
    // To a rounding or two, where a and the result are normal numbers: a guess to 14 bits and a step of Newton's.
    static Own reciprocal(Own a) {
        const __m512 guess = _mm512_rcp14_ps(a.v);
        return {{_mm512_fmadd_ps(guess, _mm512_fnmadd_ps(a.v, guess, _mm512_set1_ps(1.0f)), guess)}};
    }
    static Own larger(Own a, Own b) { return {{_mm512_max_ps(a.v, b.v)}}; }
    static Own power_of_two(Own a) {
        const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x4b400000 - 127));
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))}};
    }
    static Own where_not_below(Own a, Own b, Own x) {
        return {{_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), x.v)}};
    }
    static uint32_t not_below(Own a, Own b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
    float largest() const { return _mm512_reduce_max_ps(v); }
    float total() const { return _mm512_reduce_add_ps(v); }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_units(uint32_t* p) const { _mm512_storeu_ps(p, v); }

  protected:
    static __m512 without_tiny(__m512 a) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(kTiny), _CMP_GE_OQ), a);
    }
};

struct Lanes : Register<Lanes> {
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const Lanes element{{without_tiny(a.v)}};
        element.store_units(out);
        return element;
    }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {{_mm512_fmadd_ps(a.v, b.v, c.v)}}; }
};
constexpr int kTileRows = 12, kStep = 1;

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

struct Lanes : avx512::Register<Lanes> {
    static Lanes to_elements(Lanes a, uint32_t* out) {
        const auto element = (__m256i)_mm512_cvtneps_pbh(without_tiny(a.v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), element);
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(element), 16))}};
    }
    // Of pairs of bfloat16: two products a lane.
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
        return {{_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))}};
    }
};
constexpr int kTileRows = 12, kStep = 2;

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

}  // namespace longcat
