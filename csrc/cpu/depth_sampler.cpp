#include "depth_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "exponential.h"
#include "lanes.h"

#define LC_BODY "depth_sampler_body.h"
#include "each_isa.h"

namespace longcat {

DrawCode draw_code(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512_bf16 || isa == Isa::avx512) return avx512::draw_code;
    if (isa == Isa::avx2) return avx2::draw_code;
#endif
    (void)isa;
    return portable::draw_code;
}

}  // namespace longcat
