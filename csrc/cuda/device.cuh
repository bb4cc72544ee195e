// The vocabulary of device code: all that a kernel uses of CUDA. nvcc and NVRTC compile it without any header of the
// toolkit; a C++ compiler gets declarations, which the emulation of the tests defines with one fiber a thread.
#pragma once

#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#endif

namespace longcat::cuda {

using i64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kWarp = 32, kAllLanes = 0xffffffffu;

// As longcat::DType numbers them; those that device code reads and writes.
enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

#ifdef __CUDACC__

#define LC_BOTH __host__ __device__ __forceinline__
#define LC_DEVICE __device__ __forceinline__
#define LC_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define LC_PARAMS(Type) const __grid_constant__ Type
#define LC_SHARED __shared__
#define LC_UNROLL _Pragma("unroll")
#define LC_LOOP _Pragma("unroll 1")

LC_DEVICE u32 thread_index() { return threadIdx.x; }
LC_DEVICE u32 block_index() { return blockIdx.x; }
LC_DEVICE u32 block_index_y() { return blockIdx.y; }
LC_DEVICE u32 grid_size() { return gridDim.x; }
LC_DEVICE void sync_block() { __syncthreads(); }
LC_DEVICE void sync_warp() { __syncwarp(); }
LC_DEVICE u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
LC_DEVICE u32 shuffle_from(u32 value, u32 lane) { return __shfl_sync(kAllLanes, value, lane); }
LC_DEVICE u32 ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
LC_DEVICE u32 count_bits(u32 mask) { return __popc(mask); }
LC_DEVICE u32 lowest_bit(u32 mask) { return __ffs(mask) - 1; }
LC_DEVICE u32 leading_zeros(u32 mask) { return __clz(mask); }
LC_DEVICE void atomic_max(int* address, int value) { atomicMax(address, value); }
LC_DEVICE void atomic_add(u64* address, u64 value) { atomicAdd(address, value); }
LC_DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
LC_DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
LC_DEVICE u64 bits_of(double value) { return __double_as_longlong(value); }
LC_DEVICE double double_of(u64 bits) { return __longlong_as_double(bits); }

LC_DEVICE u16 half_of(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

LC_DEVICE float value_of_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// What a launch asks for; the same in every function of a kernel.
LC_DEVICE u8* dynamic_shared() {
    extern __shared__ __align__(16) u8 dynamic_bytes[];
    return dynamic_bytes;
}

// To a counter that other blocks wait for: all that this thread knows of is written before.
LC_DEVICE void add_release(u32* counter, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Until the counter has come to `goal`: then what others wrote before they added to it can be read.
LC_DEVICE void wait_for(const u32* counter, u32 goal) {
    u32 found;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    while (found < goal);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Sixteen bytes to shared memory, on the way until waited for; zeros where `exists` is false.
LC_DEVICE void start_copy(void* to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
LC_DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than `kLeft` of this thread's groups are on the way.
template <int kLeft>
LC_DEVICE void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 rows of 8 elements of two bytes: lane i points to row i % 8 of matrix i / 8, and gets of each its
// elements 2 (i % 4) and the next of row i / 4 (ldmatrix of the PTX ISA).
LC_DEVICE void load_matrices(u32 (&to)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(u32(__cvta_generic_to_shared(from)))
                 : "memory");
}

// A warp's product of sixteen rows of sixteen bfloat16 with eight such columns, added to float32 sums: m16n8k16 of the
// PTX ISA, which says what of it each thread has. Registers of bfloat16 are pairs along depth.
LC_DEVICE void mma_bfloat16(float (&sums)[4], const u32 (&rows)[4], u32 column0, u32 column1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column0), "r"(column1));
}
#endif

#else

#define LC_BOTH inline
#define LC_DEVICE inline
#define LC_KERNEL(threads) extern "C" void
#define LC_PARAMS(Type) const Type&
#define LC_SHARED static
#define LC_UNROLL
#define LC_LOOP

u32 thread_index();
u32 block_index();
u32 block_index_y();
u32 grid_size();
void sync_block();
void sync_warp();
u32 shuffle_xor(u32 value, u32 mask);
u32 shuffle_from(u32 value, u32 lane);
u32 ballot(bool vote);
u16 half_of(float value);
float value_of_half(u16 bits);
u8* dynamic_shared();
void add_release(u32* counter, u32 value);
void wait_for(const u32* counter, u32 goal);
void start_copy(void* to, const void* from, bool exists);
void close_group();
void wait_groups(int left);
void load_matrices(u32 (&to)[4], const void* from);
void mma_bfloat16(float (&sums)[4], const u32 (&rows)[4], u32 column0, u32 column1);
template <int kLeft>
void wait_groups() {
    wait_groups(kLeft);
}
inline void atomic_add(u64* address, u64 value) { *address += value; }
inline u32 count_bits(u32 mask) { return u32(__builtin_popcount(mask)); }
inline u32 lowest_bit(u32 mask) { return u32(__builtin_ctz(mask)); }
inline u32 leading_zeros(u32 mask) { return u32(__builtin_clz(mask)); }
inline void atomic_max(int* address, int value) { *address = value > *address ? value : *address; }

template <class To, class From>
inline To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline u32 bits_of(float value) { return same_bits<u32>(value); }
inline float float_of(u32 bits) { return same_bits<float>(bits); }
inline u64 bits_of(double value) { return same_bits<u64>(value); }
inline double double_of(u64 bits) { return same_bits<double>(bits); }

#endif

LC_DEVICE u32 lane_index() { return thread_index() % kWarp; }
LC_DEVICE float infinity() { return float_of(0x7f800000u); }
LC_DEVICE float not_a_number() { return float_of(0x7fc00000u); }
LC_DEVICE float largest_float() { return float_of(0x7f7fffffu); }
LC_DEVICE double double_infinity() { return double_of(0x7ff0000000000000ull); }
LC_DEVICE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }
LC_DEVICE bool is_finite(double value) { return (bits_of(value) >> 52 & 0x7ff) != 0x7ff; }

// 2^n for n in [-126, 127].
LC_DEVICE float power_of_two(int n) { return float_of(u32(n + 127) << 23); }

// floor(log2 |value|) of a normal number.
LC_DEVICE int exponent_of(float value) { return int(bits_of(value) >> 23 & 0xff) - 127; }

LC_DEVICE float shuffle_xor(float value, u32 mask) { return float_of(shuffle_xor(bits_of(value), mask)); }

LC_DEVICE double shuffle_xor(double value, u32 mask) {
    const u64 bits = bits_of(value);
    return double_of(u64(shuffle_xor(u32(bits >> 32), mask)) << 32 | shuffle_xor(u32(bits), mask));
}

LC_DEVICE u16 bfloat16_of(float value) {
    const u32 bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16(bits >> 16 | 0x40u);
    return u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

LC_DEVICE float load(const void* from, int type, i64 index) {
    if (type == kFloat32) return static_cast<const float*>(from)[index];
    const u16 bits = static_cast<const u16*>(from)[index];
    return type == kFloat16 ? value_of_half(bits) : float_of(u32(bits) << 16);
}

LC_DEVICE void store(void* to, int type, i64 index, float value) {
    if (type == kFloat32)
        static_cast<float*>(to)[index] = value;
    else
        static_cast<u16*>(to)[index] = type == kFloat16 ? half_of(value) : bfloat16_of(value);
}

// Rounds to the type and back.
LC_DEVICE float round_to(int type, float value) {
    if (type == kFloat32) return value;
    return type == kFloat16 ? value_of_half(half_of(value)) : float_of(u32(bfloat16_of(value)) << 16);
}

}  // namespace longcat::cuda
