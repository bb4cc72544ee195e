#include "gemm_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace longcat {
namespace {

constexpr int kAhead = 512;  // bytes from a line's element to what is prefetched when it is read

}  // namespace

namespace portable {
namespace {

using Floats = Lanes;
void transpose(Lanes (&rows)[Lanes::kWidth]) {
    for (int i = 0; i < Lanes::kWidth; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = rows[i].v[j];
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = kept;
        }
}

template <class T>
inline void load_transposed(const T* const (&line)[Lanes::kWidth], int64_t first, Lanes (&units)[Lanes::kWidth]) {
    for (int c = 0; c < Lanes::kWidth; ++c)
        units[c] = Lanes::load_units(reinterpret_cast<const uint32_t*>(line[c] + first));
    transpose(units);
}

inline void load_piece(const char* line, int64_t stride, Lanes (&units)[4]) {
    for (int c = 0; c < 4; ++c) units[c] = Lanes::load_units(reinterpret_cast<const uint32_t*>(line + c * stride));
    transpose(units);
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

using Floats = Lanes;
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

template <class T>
inline void load_transposed(const T* const (&line)[Lanes::kWidth], int64_t first, Lanes (&units)[Lanes::kWidth]) {
    for (int c = 0; c < Lanes::kWidth; ++c)
        units[c] = Lanes::load_units(reinterpret_cast<const uint32_t*>(line[c] + first));
    transpose(units);
}

inline void load_piece(const char* line, int64_t stride, Lanes (&units)[4]) {
    __m256 lines[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        lines[i] = _mm256_loadu2_m128(reinterpret_cast<const float*>(line + (4 + i) * stride),
                                      reinterpret_cast<const float*>(line + i * stride));
    const __m256 low[2] = {_mm256_unpacklo_ps(lines[0], lines[1]), _mm256_unpacklo_ps(lines[2], lines[3])};
    const __m256 high[2] = {_mm256_unpackhi_ps(lines[0], lines[1]), _mm256_unpackhi_ps(lines[2], lines[3])};
    units[0].v = _mm256_shuffle_ps(low[0], low[1], 0x44);
    units[1].v = _mm256_shuffle_ps(low[0], low[1], 0xee);
    units[2].v = _mm256_shuffle_ps(high[0], high[1], 0x44);
    units[3].v = _mm256_shuffle_ps(high[0], high[1], 0xee);
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

using Floats = Lanes;
template <class L, class T>
inline __attribute__((always_inline)) void load_transposed(const T* const (&line)[16], int64_t first, L (&units)[16]) {
    // Half a line at a time: loads then do a part of what shuffles would have to.
#pragma GCC unroll 2
    for (int half = 0; half < 16; half += 8) {
        const auto load = [&](int i) {
            return _mm256_loadu_ps(reinterpret_cast<const float*>(line[i] + first) + half);
        };
        __m512 fours[2][4];  // quarters of [b][q]: elements q and 4 + q of four lines, then of the next four
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {
            __m512 lines[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)  // a masked load, unlike an insertion, needs no shuffle
                lines[i] =
                    _mm512_mask_broadcast_f32x8(_mm512_castps256_ps512(load(8 * b + i)), 0xff00, load(8 * b + 4 + i));
            const __m512 low[2] = {_mm512_unpacklo_ps(lines[0], lines[1]), _mm512_unpacklo_ps(lines[2], lines[3])};
            const __m512 high[2] = {_mm512_unpackhi_ps(lines[0], lines[1]), _mm512_unpackhi_ps(lines[2], lines[3])};
            fours[b][0] = _mm512_shuffle_ps(low[0], low[1], 0x44);
            fours[b][1] = _mm512_shuffle_ps(low[0], low[1], 0xee);
            fours[b][2] = _mm512_shuffle_ps(high[0], high[1], 0x44);
            fours[b][3] = _mm512_shuffle_ps(high[0], high[1], 0xee);
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            units[half + q].v = _mm512_shuffle_f32x4(fours[0][q], fours[1][q], 0x88);
            units[half + 4 + q].v = _mm512_shuffle_f32x4(fours[0][q], fours[1][q], 0xdd);
        }
    }
}

// Four units of sixteen lines.
template <class L>
inline __attribute__((always_inline)) void load_piece(const char* line, int64_t stride, L (&units)[4]) {
    const auto load = [&](int i) __attribute__((always_inline)) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(line + i * stride));
    };
    __m512 lines[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        lines[i] = _mm512_mask_broadcast_f32x4(_mm512_castps128_ps512(load(i)), 0x00f0, load(4 + i));
        lines[i] = _mm512_mask_broadcast_f32x4(lines[i], 0x0f00, load(8 + i));
        lines[i] = _mm512_mask_broadcast_f32x4(lines[i], 0xf000, load(12 + i));
    }
    const __m512 low[2] = {_mm512_unpacklo_ps(lines[0], lines[1]), _mm512_unpacklo_ps(lines[2], lines[3])};
    const __m512 high[2] = {_mm512_unpackhi_ps(lines[0], lines[1]), _mm512_unpackhi_ps(lines[2], lines[3])};
    units[0].v = _mm512_shuffle_ps(low[0], low[1], 0x44);
    units[1].v = _mm512_shuffle_ps(low[0], low[1], 0xee);
    units[2].v = _mm512_shuffle_ps(high[0], high[1], 0x44);
    units[3].v = _mm512_shuffle_ps(high[0], high[1], 0xee);
}

#include "gemm_kernels_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

using avx512::load_piece;
using avx512::load_transposed;
using Floats = avx512::Lanes;
inline void narrow(const float* from, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

// Pairs of elements i of two lines, of which the second may be null, for at most 16 i.
inline void narrow_pairs(const float* one, const float* second, int64_t count, uint32_t* out) {
    const auto mask = __mmask16((1u << count) - 1);
    const auto narrowed = [&](const float* line) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, line)));
    };
    __m512i pairs = narrowed(one);
    if (second != nullptr) pairs = _mm512_or_epi32(pairs, _mm512_slli_epi32(narrowed(second), 16));
    _mm512_mask_storeu_epi32(out, mask, pairs);
}

// 1 / (1 + 2^t), t = -x log2 e, to 2^-13: what becomes of it is rounded to bfloat16, or no better than such products.
// 2^t is 2^floor(t) times a polynomial in t - floor(t), fitted to its relative error.
inline Floats coarse_sigmoid(Floats x) {
    const __m512 t = Floats::multiply(x, Floats::splat(-1.44269504f)).v;
    const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
    __m512 p = Floats::splat(1.35341519e-2f).v;
#pragma GCC unroll 4
    for (const float term : {5.20114936e-2f, 2.41442740e-1f, 6.93003833e-1f, 1.00000262f})
        p = _mm512_fmadd_ps(p, f, Floats::splat(term).v);
    return {{_mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps(p, t), Floats::splat(1.0f).v))}};
}

// Of float32: pairs of the rounded elements of each line.
inline __attribute__((always_inline)) void load_transposed(const float* const (&line)[16], int64_t first,
                                                           Lanes (&units)[16]) {
    alignas(64) uint32_t room[16][16];
    const uint32_t* rows[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
        const float* from = line[c] + first;
        rows[c] = room[c];
        _mm512_store_si512(room[c], (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
    }
    load_transposed(rows, 0, units);
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
