// A register of doubles for each instruction set, loaded from shorter elements and rounded to float32. Intrinsics
// where a register holds more than two, since GCC 12 widens its own vectors half by half.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace longcat {

namespace portable {
namespace {

struct Doubles {
    static constexpr int kWidth = 2;
    typedef double Vector __attribute__((vector_size(16)));
    typedef float Floats __attribute__((vector_size(8)));
    Vector v;
    static Doubles splat(double x) { return {Vector{x, x}}; }
    static Doubles load(const double* p) { return {Vector{p[0], p[1]}}; }
    static Doubles load(const float* p) { return {__builtin_convertvector(Floats{p[0], p[1]}, Vector)}; }
    static Doubles load(const BFloat16* p) {
        return {__builtin_convertvector(Floats{to_float(p[0]), to_float(p[1])}, Vector)};
    }
    static Doubles add(Doubles a, Doubles b) { return {a.v + b.v}; }
    static Doubles multiply(Doubles a, Doubles b) { return {a.v * b.v}; }
    void store(double* p) const { std::memcpy(p, &v, sizeof v); }
    void store(float* p) const {
        const Floats floats = __builtin_convertvector(v, Floats);
        std::memcpy(p, &floats, sizeof floats);
    }
    Doubles rounded() const { return {__builtin_convertvector(__builtin_convertvector(v, Floats), Vector)}; }
};

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

struct Doubles {
    static constexpr int kWidth = 4;
    __m256d v;
    static Doubles splat(double x) { return {_mm256_set1_pd(x)}; }
    static Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
    static Doubles load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
    static Doubles load(const BFloat16* p) {
        const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)))};
    }
    static Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
    static Doubles multiply(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
    Doubles rounded() const { return {_mm256_cvtps_pd(_mm256_cvtpd_ps(v))}; }
};

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

struct Doubles {
    static constexpr int kWidth = 8;
    __m512d v;
    static Doubles splat(double x) { return {_mm512_set1_pd(x)}; }
    static Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Doubles load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
    static Doubles load(const BFloat16* p) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)))};
    }
    static Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
    static Doubles multiply(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
    Doubles rounded() const { return {_mm512_cvtps_pd(_mm512_cvtpd_ps(v))}; }
};

}  // namespace
}  // namespace avx512
LC_TARGET_END
#endif

}  // namespace longcat
