// The part of the CUDA driver's C interface that is used, declared here so that a build needs no toolkit. A test
// compares it with cuda.h where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longcat::cuda::api {

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                            // CUfunction_attribute
constexpr unsigned kCooperative = 2, kClusterDimension = 4;     // CUlaunchAttributeID
constexpr int kTensorFloat16 = 6, kInterleaveNone = 0, kSwizzle128 = 3, kPromotion256 = 3, kFillZero = 0;

struct LaunchAttribute {
    unsigned id;
    char pad[4];
    union {
        char bytes[64];
        int cooperative;
        unsigned cluster[3];
    } value;
};

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

// Every entry is a function of libcuda.so.1 that returns a CUresult.
struct Driver {
    int (*cuInit)(unsigned);
    int (*cuGetErrorName)(int, const char**);
    int (*cuGetErrorString)(int, const char**);
    int (*cuDeviceGetCount)(int*);
    int (*cuDeviceGet)(int*, int);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuDevicePrimaryCtxRetain)(void**, int);
    int (*cuCtxPushCurrent_v2)(void*);
    int (*cuCtxPopCurrent_v2)(void**);
    int (*cuModuleLoadData)(void**, const void*);
    int (*cuModuleUnload)(void*);
    int (*cuModuleGetFunction)(void**, void*, const char*);
    int (*cuFuncSetAttribute)(void*, int, int);
    int (*cuLaunchKernelEx)(const LaunchConfig*, void*, void**, void**);
    int (*cuMemsetD8Async)(unsigned long long, unsigned char, size_t, void*);
    int (*cuTensorMapEncodeTiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                                  const uint32_t*, int, int, int, int);
};

}  // namespace longcat::cuda::api
