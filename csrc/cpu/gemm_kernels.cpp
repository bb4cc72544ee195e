#include "gemm_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "exponential.h"
#include "lanes.h"

namespace longcat {
namespace {

constexpr int kAhead = 512;  // bytes from a line's element to what is prefetched when it is read

}  // namespace

namespace portable {
namespace {

void transpose(Lanes (&rows)[Lanes::kWidth]) {
    for (int i = 0; i < Lanes::kWidth; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = rows[i].v[j];
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = kept;
        }
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

inline void transpose(Lanes (&rows)[Lanes::kWidth]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            const __m256 one = pairs[4 * i + j], other = pairs[4 * i + 2 + j];
            fours[4 * i + 2 * j] = _mm256_shuffle_ps(one, other, 0x44);
            fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps(one, other, 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i].v = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        rows[4 + i].v = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

template <class L>
inline __attribute__((always_inline)) void transpose(L (&rows)[16]) {
    __m512 pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512 one = pairs[4 * i + j], other = pairs[4 * i + 2 + j];
            fours[4 * i + 2 * j] = _mm512_shuffle_ps(one, other, 0x44);
            fours[4 * i + 2 * j + 1] = _mm512_shuffle_ps(one, other, 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            eights[8 * j + i] = _mm512_shuffle_f32x4(fours[8 * j + i], fours[8 * j + 4 + i], 0x88);
            eights[8 * j + 4 + i] = _mm512_shuffle_f32x4(fours[8 * j + i], fours[8 * j + 4 + i], 0xdd);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        rows[i].v = _mm512_shuffle_f32x4(eights[i], eights[8 + i], 0x88);
        rows[8 + i].v = _mm512_shuffle_f32x4(eights[i], eights[8 + i], 0xdd);
    }
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

using avx512::transpose;
inline void narrow(const float* from, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

const GemmKernels& gemm_kernels(Isa isa, DType dtype) {
#if LC_X86
    if (isa == Isa::avx512_bf16 && dtype == DType::bfloat16) return avx512_bf16::kKernels;
    if (isa == Isa::avx512_bf16 || isa == Isa::avx512) return avx512::kKernels;
    if (isa == Isa::avx2) return avx2::kKernels;
#endif
    (void)isa, (void)dtype;
    return portable::kKernels;
}

}  // namespace longcat
