#include "longcat/isa.h"

#include <stdexcept>

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

const std::vector<Isa>& isas_here() {
    static const std::vector<Isa> here = [] {
        std::vector<Isa> found;
        for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
            if (runs_here(isa)) found.push_back(isa);
        return found;
    }();
    return here;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (Isa isa : isas_here()) names.emplace_back(kNames[int(isa)]);
    return names;
}

Isa isa_named(const std::string& name) {
    if (name == "auto") return isas_here().back();
    for (Isa isa : isas_here())
        if (name == kNames[int(isa)]) return isa;
    throw std::invalid_argument("isa must be one that this processor has, got '" + name + "'");
}

}  // namespace longcat
