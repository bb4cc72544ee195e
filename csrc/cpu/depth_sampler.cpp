#include "depth_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "exponential.h"
#include "lanes.h"

namespace longcat {

#define LC_COMPRESS 0
namespace portable {
namespace {
#include "depth_sampler_body.h"
}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {
#include "depth_sampler_body.h"
}  // namespace
}  // namespace avx2
LC_TARGET_END

#undef LC_COMPRESS
#define LC_COMPRESS 1
LC_TARGET_AVX512
namespace avx512 {
namespace {
#include "depth_sampler_body.h"
}  // namespace
}  // namespace avx512
LC_TARGET_END
#endif

DrawCode draw_code(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512_bf16 || isa == Isa::avx512) return avx512::draw_code;
    if (isa == Isa::avx2) return avx2::draw_code;
#endif
    (void)isa;
    return portable::draw_code;
}

}  // namespace longcat
