// e^x and what activations make of it, without branches: loops over them become vector instructions.
#pragma once

#include "longcat/dtypes.h"

namespace longcat {

// To two roundings: x = n ln 2 + r, and a polynomial for e^r (Cephes expf). Of NaN some number: what is made of it is
// multiplied by x again.
inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float value = p * (r * r) + (r + 1.0f);
    return value * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float silu(float x) { return x * sigmoid(x); }

// x times the normal distribution function, by erfc(a) = e^(-a^2) p(1 / (1 + 0.32 a)), a = |x| / sqrt(2): p is within
// 3e-8 of what it stands for (fitted by least squares on Chebyshev nodes, a up to 7).
inline float gelu(float x) {
    const float a = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.32f * a);
    float p = -0.1835683137178421f;
    p = p * t + 0.73882657289505f;
    p = p * t - 0.8449472784996033f;
    p = p * t + 0.8954870104789734f;
    p = p * t - 0.24808906018733978f;
    p = p * t + 0.30661946535110474f;
    p = p * t + 0.15183043479919434f;
    p = p * t + 0.18402589857578278f;
    p = p * t - 0.00018476204422768205f;
    const float tail = 0.5f * (exponential(-a * a) * p);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace longcat
