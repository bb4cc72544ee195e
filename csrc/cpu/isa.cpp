#include "longcat/isa.h"

#include <algorithm>

#include "longcat/check.h"

namespace longcat {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

bool runs_here(Isa isa) {
#if LC_X86
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx512)
        return runs_here(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512_bf16) return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == Isa::portable;
}

}  // namespace

std::vector<std::string> compiled_isas() { return std::vector<std::string>(kNames, kNames + (LC_X86 ? 4 : 1)); }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
        if (runs_here(isa)) names.emplace_back(kNames[int(isa)]);
    return names;
}

Isa isa_named(const std::string& name) {
    const auto names = available_isas();
    const auto& wanted = name == "auto" ? names.back() : name;
    LC_CHECK(std::find(names.begin(), names.end(), wanted) != names.end(),
             "isa must be one that this processor has, got '" + name + "'");
    return Isa(std::find(std::begin(kNames), std::end(kNames), wanted) - std::begin(kNames));
}

}  // namespace longcat
