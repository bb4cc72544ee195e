#include "depth_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "exponential.h"
#include "lanes.h"

#define LC_PAIRS_ONLY 0
#define LC_BODY "depth_kernels_body.h"
#include "each_isa.h"

namespace longcat {

#if LC_X86
#undef LC_PAIRS_ONLY
#define LC_PAIRS_ONLY 1  // floats and bytes are not multiplied as pairs of bfloat16
LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

inline void narrow(const float* from, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

#include "depth_kernels_body.h"

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

const DepthKernels& depth_kernels(Isa isa, WeightFormat format) {
    const auto pick = [&](const DepthKernels& floats, const DepthKernels& pairs, const DepthKernels& bytes) {
        return format == WeightFormat::float32 ? &floats : format == WeightFormat::bfloat16 ? &pairs : &bytes;
    };
#if LC_X86
    if (isa == Isa::avx512_bf16) return *pick(avx512::kFloats, avx512_bf16::kPairs, avx512::kBytes);
    if (isa == Isa::avx512) return *pick(avx512::kFloats, avx512::kPairs, avx512::kBytes);
    if (isa == Isa::avx2) return *pick(avx2::kFloats, avx2::kPairs, avx2::kBytes);
#endif
    (void)isa;
    return *pick(portable::kFloats, portable::kPairs, portable::kBytes);
}

}  // namespace longcat
