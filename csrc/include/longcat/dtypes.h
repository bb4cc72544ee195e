// Element types: their names, and conversion of the 16-bit ones to and from float, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "longcat/check.h"

namespace longcat {

enum class DType { float32, bfloat16, float16, int64, int32, boolean, uint8, other };

// What `dispatch_float` takes: to be checked before a parallel region, out of which no exception may leave.
inline bool is_float(DType dtype) {
    return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

inline int64_t bytes_of(DType dtype) {
    if (dtype == DType::int64) return 8;
    if (dtype == DType::float32 || dtype == DType::int32) return 4;
    return dtype == DType::bfloat16 || dtype == DType::float16 ? 2 : 1;
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

// The conversions of Float16 have no branches, so that loops over them become vector instructions.
inline float to_float(Float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    // Subnormals by way of an integer: as floats they would read as zero where the caller flushes denormals.
    const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
    const uint32_t finite = magnitude < 0x400u ? subnormal : (magnitude << 13) + 0x38000000u;
    const uint32_t other = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    return float_of(sign | (magnitude >= 0x7c00u ? other : finite));
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Below the smallest normal half, adding 0.5 leaves the rounded subnormal in the low bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;
    rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
    return {uint16_t(sign | rounded)};
}

// Rounds to T and back.
template <class T>
inline float round_to(float value) {
    return to_float(from_float<T>(value));
}

template <>
inline float round_to<Float16>(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) & ~0x1fffu;
    const uint32_t subnormal = bits_of((float_of(magnitude) + 0.5f) - 0.5f);
    uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477ff000u ? 0x7f800000u : rounded;
    rounded = magnitude > 0x7f800000u ? magnitude : rounded;
    return float_of((bits & 0x80000000u) | rounded);
}

// Calls `body` with a value of the C++ type that `dtype` names.
template <class Body>
void dispatch_float(DType dtype, const char* what, Body&& body) {
    switch (dtype) {
        case DType::float32:
            return body(float{});
        case DType::bfloat16:
            return body(BFloat16{});
        case DType::float16:
            return body(Float16{});
        default:
            LC_CHECK(false, std::string(what) + " must be float32, bfloat16 or float16");
    }
}

}  // namespace longcat
