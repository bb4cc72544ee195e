// The most arithmetic that cores can do: what a benchmark's roofline is drawn with. Not an op.
#pragma once

#include <cstdint>
#include <string>

namespace longcat {

// Floating-point operations a second of `threads` threads that do nothing but independent
//     kind "fma"        float32 multiply-adds, isa "avx2" or "avx512",
//     kind "bf16_dot"   bfloat16 pair products added to float32 (vdpbf16ps), isa "avx512".
// One thread is timed by the processor time it got, several by the clock on the wall; the best of five tries counts.
// std::invalid_argument where this processor, or the compiler of this module, lacks the instructions.
double peak(const std::string& kind, const std::string& isa, int threads);

// The sum, modulo 2^64, of sections [count] of (first, bytes) of memory, read in this order by one thread: what a
// program that must read them cannot be faster than. First bytes and lengths are multiples of 64.
uint64_t read_sections(const void* memory, const int64_t* sections, int64_t count);

}  // namespace longcat
