// Includes the file that LC_BODY names once for each instruction set, inside its namespace and target; LC_AVX512 tells
// them apart there. What is done with elements other than floats may need a set more: see depth_kernels.cpp.
// No include guard.
#define LC_AVX512 0
namespace longcat::portable {
namespace {
#include LC_BODY
}
}  // namespace longcat::portable

#if LC_X86
LC_TARGET_AVX2
namespace longcat::avx2 {
namespace {
#include LC_BODY
}
}  // namespace longcat::avx2
LC_TARGET_END

#undef LC_AVX512
#define LC_AVX512 1
LC_TARGET_AVX512
namespace longcat::avx512 {
namespace {
#include LC_BODY
}
}  // namespace longcat::avx512
LC_TARGET_END
#endif
#undef LC_AVX512
