// The launchers and the plain kernels on the emulated device, for ctypes. Every function gives null, or what went wrong.
#include <exception>

#include "cuda/half_layout.h"
#include "cuda/rvq_encode.cuh"
#include "cuda/rvq_encode_launch.h"
#include "emulation.h"

namespace {

using namespace longcat;
using namespace longcat::cuda;

#define LC_KERNEL_OF(name, Params) {#name, [](const void* p) { name(*static_cast<const Params*>(p)); }}
const std::map<std::string, Kernel> kKernels = {
    LC_KERNEL_OF(rvq_pack_norm, RvqPack),       LC_KERNEL_OF(rvq_pack_sum, RvqPack),
    LC_KERNEL_OF(rvq_pack_centre, RvqPack),     LC_KERNEL_OF(rvq_pack_words, RvqPack),
    LC_KERNEL_OF(rvq_prepare, RvqPrepare),      LC_KERNEL_OF(rvq_coarse_plain, RvqCoarse),
    LC_KERNEL_OF(rvq_finish, RvqFinish),        LC_KERNEL_OF(rvq_losses, RvqLosses),
    LC_KERNEL_OF(rvq_gather, RvqGather),        LC_KERNEL_OF(rvq_backward, RvqBackward),
};

template <class Body>
const char* guarded(Body&& body) {
    static std::string message;
    try {
        body();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

}  // namespace

extern "C" {

struct EncodeArguments {
    long rows, dim, row_stride, column_stride, levels;
    const void* x;
    int dtype, residual_dtype;
    const float* const* words;
    const long *entries, *strides;
    const bool* mask;
    void* const* packed;  // one a level, or null
    void* quantized;
    float *residual, *losses;
    long* codes;
    int multiprocessors;
};

const char* emulate_rvq_encode(const EncodeArguments* a) {
    return guarded([&] {
        longcat::RvqEncode p{};
        p.rows = a->rows, p.dim = a->dim, p.x = a->x, p.dtype = DType(a->dtype), p.row_stride = a->row_stride;
        p.column_stride = a->column_stride, p.mask = a->mask, p.residual_dtype = DType(a->residual_dtype);
        p.quantized = a->quantized, p.residual = a->residual, p.losses = a->losses, p.codes = a->codes;
        std::vector<void*> packed;
        for (long level = 0; level < a->levels; ++level) {
            p.levels.push_back({a->words[level], a->entries[level], a->strides[level]});
            if (a->packed != nullptr) packed.push_back(a->packed[level]);
        }
        EmulatedQueue queue(kKernels, a->multiprocessors);
        std::vector<char> memory(size_t(longcat::cuda::rvq_encode(queue, p, packed, nullptr)) + 256, char(0xff));
        const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256;
        longcat::cuda::rvq_encode(queue, p, packed, reinterpret_cast<void*>(start));
    });
}

const char* emulate_rvq_pack(const float* words, long stride, long entries, long dim, void* packed) {
    return guarded([&] {
        EmulatedQueue queue(kKernels, 4);
        std::vector<char> memory(size_t(rvq_pack(queue, words, stride, entries, dim, nullptr, nullptr)) + 256);
        const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256;
        rvq_pack(queue, words, stride, entries, dim, packed, reinterpret_cast<void*>(start));
    });
}

const char* emulate_rvq_encode_backward(const EncodeArguments* a, const void* grad, int grad_dtype, long grad_row_stride,
                                        long grad_column_stride, const float* scales, void* out) {
    return guarded([&] {
        longcat::RvqEncode p{};
        p.rows = a->rows, p.dim = a->dim, p.x = a->x, p.dtype = DType(a->dtype), p.row_stride = a->row_stride;
        p.column_stride = a->column_stride, p.residual_dtype = DType(a->residual_dtype), p.codes = a->codes;
        for (long level = 0; level < a->levels; ++level)
            p.levels.push_back({a->words[level], a->entries[level], a->strides[level]});
        EmulatedQueue queue(kKernels, a->multiprocessors);
        rvq_encode_backward(queue, {&p, grad, DType(grad_dtype), grad_row_stride, grad_column_stride, scales, out});
    });
}

}  // extern "C"
