// Instruction sets: which are compiled in, which this processor has, and how a part of a file is compiled for one.
//
//     #if LC_X86
//     LC_TARGET_AVX2
//     namespace longcat::avx2 { ... }
//     LC_TARGET_END
//     #endif
#pragma once

#include <string>
#include <vector>

// The pragmas are GCC's; other compilers and processors get the portable path.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LC_X86 1
#define LC_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define LC_TARGET_AVX512        \
    _Pragma("GCC push_options") \
        _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512\")")
#define LC_TARGET_AVX512_BF16   \
    _Pragma("GCC push_options") \
        _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512\")")
#define LC_TARGET_END _Pragma("GCC pop_options")
#else
#define LC_X86 0
#endif

namespace longcat {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// Those compiled in that this processor has, the fastest last.
const std::vector<Isa>& isas_here();

// Their names.
std::vector<std::string> available_isas();

// Names of all compiled in.
std::vector<std::string> compiled_isas();

// The one called `name`, or the fastest for "auto"; std::invalid_argument if it cannot run here.
Isa isa_named(const std::string& name);

}  // namespace longcat
