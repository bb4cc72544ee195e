// Arguments of rvq_encode on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "bindings/rvq_encode.h"
#include "bindings/rvq_encode_backward.h"
#include "cuda/half_layout.h"
#include "cuda/rvq_encode_launch.h"

namespace longcat {

inline void* half_codebook(const CudaTensorView& packed, const Codebook& book, int64_t dim) {
    int64_t bytes = 0;
    cuda::codebook_at(nullptr, 0, book.entries, dim, nullptr, &bytes);
    LC_CHECK(packed.device == "cuda" && packed.shape.size() == 1 && packed.shape[0] >= bytes &&
                 packed.is_contiguous() && reinterpret_cast<uintptr_t>(packed.data) % 256 == 0,
             "rvq_encode: packed must be the packed form of the codebook");
    return packed.data;
}

inline void rvq_encode_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                            const CudaTensorView& x, const std::vector<CudaTensorView>& codebooks,
                            const std::vector<CudaTensorView>& packed, const std::optional<CudaTensorView>& mask,
                            DType residual_dtype, const CudaTensorView& quantized, const CudaTensorView& residual,
                            const CudaTensorView& losses, const CudaTensorView& codes) {
    check_device("rvq_encode", kernels, x);
    const RvqEncode p = rvq_encode_params(x, codebooks, mask, residual_dtype, quantized, residual, losses, codes);
    LC_CHECK(packed.empty() || packed.size() == p.levels.size(), "rvq_encode: packed must have one codebook a level");
    std::vector<void*> books;
    for (size_t level = 0; level < packed.size(); ++level)
        books.push_back(half_codebook(packed[level], p.levels[level], p.dim));
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_encode(queue, p, books, workspace);
    });
}

inline void rvq_pack_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                          const CudaTensorView& words, const CudaTensorView& packed) {
    check_device("rvq_encode", kernels, words);
    const Codebook book = words_view(words);
    void* place = half_codebook(packed, book, words.shape[1]);
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_pack(queue, book.words, book.stride, book.entries, words.shape[1], place, workspace);
    });
}

inline void rvq_encode_backward_cuda(CudaModule& kernels, uintptr_t stream, const std::optional<CudaTensorView>& grad,
                                     const std::optional<CudaTensorView>& scales, const CudaTensorView& x,
                                     const CudaTensorView& codes, const std::vector<CudaTensorView>& codebooks,
                                     DType residual_dtype, const CudaTensorView& grad_x) {
    check_device("rvq_encode_backward", kernels, x);
    const RvqEncodeBackward p = rvq_encode_backward_params(grad, scales, x, codes, codebooks, residual_dtype, grad_x);
    cuda::DriverQueue queue(kernels.module, stream);
    cuda::rvq_encode_backward(queue, p);
}

inline void bind_rvq_encode_cuda(pybind11::module_& m) {
    m.def("rvq_encode_cuda", &rvq_encode_cuda);
    m.def("rvq_pack_cuda", &rvq_pack_cuda);
    m.def("rvq_encode_backward_cuda", &rvq_encode_backward_cuda);
}

}  // namespace longcat
