#include "longcat/peak.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#include "longcat/check.h"
#include "longcat/isa.h"

#if LC_X86
#include <immintrin.h>
#endif

namespace longcat {
namespace {

[[maybe_unused]] constexpr long kSteps = 8000000;  // of a try: some ten milliseconds
constexpr int kTries = 5;

#if LC_X86

// Each loop keeps enough sums in registers to cover the latency of its instruction on two ports. The empty asm makes
// the factors unknown anew at every step, so that no product is hoisted; the one after the loop uses the sums.

LC_TARGET_AVX2
void fma_avx2() {
    constexpr int sums = 12;
    __m256 sum[sums], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    for (auto& s : sum) s = _mm256_setzero_ps();
    for (long step = 0; step < kSteps; ++step) {
        asm volatile("" : "+x"(a), "+x"(b));
        for (auto& s : sum) s = _mm256_fmadd_ps(a, b, s);
    }
    for (auto& s : sum) asm volatile("" ::"x"(s));
}
LC_TARGET_END

LC_TARGET_AVX512
void fma_avx512() {
    constexpr int sums = 16;
    __m512 sum[sums], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (long step = 0; step < kSteps; ++step) {
        asm volatile("" : "+v"(a), "+v"(b));
        for (auto& s : sum) s = _mm512_fmadd_ps(a, b, s);
    }
    for (auto& s : sum) asm volatile("" ::"v"(s));
}
LC_TARGET_END

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
void bf16_dot_avx512() {
    constexpr int sums = 16;
    __m512 sum[sums];
    __m512i a = _mm512_set1_epi16(0x3f00), b = _mm512_set1_epi16(0x3e80);  // 0.5 and 0.25 in bfloat16
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (long step = 0; step < kSteps; ++step) {
        asm volatile("" : "+v"(a), "+v"(b));
        for (auto& s : sum) s = _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
    }
    for (auto& s : sum) asm volatile("" ::"v"(s));
}
#pragma GCC pop_options

bool has(const std::string& isa) {
    const auto names = available_isas();
    return std::find(names.begin(), names.end(), isa) != names.end();
}

#endif

struct Loop {
    void (*run)();
    double flops;  // of one run
};

Loop loop_of(const std::string& kind, const std::string& isa) {
#if LC_X86
    if (kind == "fma" && isa == "avx2" && has("avx2")) return {fma_avx2, 2.0 * 8 * 12 * kSteps};
    if (kind == "fma" && isa == "avx512" && has("avx512")) return {fma_avx512, 2.0 * 16 * 16 * kSteps};
    if (kind == "bf16_dot" && isa == "avx512" && has("avx512") && __builtin_cpu_supports("avx512bf16"))
        return {bf16_dot_avx512, 2.0 * 32 * 16 * kSteps};
#endif
    throw std::invalid_argument("peak: kind and isa must be what this processor has, got '" + kind + "' by '" + isa +
                                "'");
}

uint64_t sum_plain(const uint64_t* words, int64_t count) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < count; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

#if LC_X86
LC_TARGET_AVX512
uint64_t sum_avx512(const uint64_t* words, int64_t count) {
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(words + i + 8 * j));
    for (; i < count; i += 8) sums[0] = _mm512_add_epi64(sums[0], _mm512_loadu_si512(words + i));
    alignas(64) uint64_t parts[8];
    _mm512_store_si512(parts, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])));
    return sum_plain(parts, 8);
}
LC_TARGET_END
#endif

double seconds(int threads) {
    if (threads == 1) return double(std::clock()) / CLOCKS_PER_SEC;
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double peak(const std::string& kind, const std::string& isa, int threads) {
    const Loop loop = loop_of(kind, isa);
    double best = 0;
    for (int t = 0; t < kTries; ++t) {
        const double start = seconds(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; ++thread) loop.run();
        best = std::max(best, threads * loop.flops / (seconds(threads) - start));
    }
    return best;
}

uint64_t read_sections(const void* memory, const int64_t* sections, int64_t count) {
    auto* sum = sum_plain;
#if LC_X86
    if (has("avx512")) sum = sum_avx512;
#endif
    uint64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const char* first = static_cast<const char*>(memory) + sections[2 * i];
        total += sum(reinterpret_cast<const uint64_t*>(first), sections[2 * i + 1] / 8);
    }
    return total;
}

}  // namespace longcat
