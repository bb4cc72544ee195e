// Arguments of rvq_encode on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "bindings/rvq_encode.h"
#include "cuda/half_layout.h"
#include "cuda/rvq_encode_launch.h"

namespace longcat {

inline void* packed_codebook(const CudaTensorView& packed, const RvqEncode::Codebook& book, int64_t dim) {
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
        books.push_back(packed_codebook(packed[level], p.levels[level], p.dim));
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_encode(queue, p, books, workspace);
    });
}

inline void rvq_pack_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                          const CudaTensorView& words, const CudaTensorView& packed) {
    check_device("rvq_encode", kernels, words);
    auto* elements = words.matrix<float>("rvq_encode: codebooks", DType::float32);
    LC_CHECK(words.shape[0] >= 1 && words.shape[1] >= 1 && (words.shape[1] == 1 || words.strides[1] == 1),
             "rvq_encode: codebooks must have rows with adjacent elements");
    const RvqEncode::Codebook book = {elements, words.shape[0], words.strides[0]};
    void* place = packed_codebook(packed, book, words.shape[1]);
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_pack(queue, book.words, book.stride, book.entries, words.shape[1], place, workspace);
    });
}

inline void rvq_encode_backward_cuda(CudaModule& kernels, uintptr_t stream, const std::optional<CudaTensorView>& grad,
                                     const std::optional<CudaTensorView>& scales, const CudaTensorView& x,
                                     const CudaTensorView& codes, const std::vector<CudaTensorView>& codebooks,
                                     DType residual_dtype, const CudaTensorView& out) {
    check_device("rvq_encode", kernels, x);
    RvqEncode p{};
    p.x = x.matrix("rvq_encode: x", x.dtype), p.dtype = x.dtype, p.residual_dtype = residual_dtype;
    p.rows = x.shape[0], p.dim = x.shape[1], p.row_stride = x.strides[0], p.column_stride = x.strides[1];
    for (const CudaTensorView& book : codebooks) {
        const auto* words = book.matrix<float>("rvq_encode: codebooks", DType::float32);
        LC_CHECK(book.shape[1] == p.dim && (p.dim == 1 || book.strides[1] == 1),
                 "rvq_encode: codebooks must be as wide as x, with adjacent elements");
        p.levels.push_back({words, book.shape[0], book.strides[0]});
    }
    const int64_t levels = int64_t(codebooks.size());
    p.codes = codes.whole<int64_t>("rvq_encode: codes", DType::int64, {p.rows, levels});
    cuda::RvqEncodeBackward backward = {&p, nullptr, DType::float32, 0, 0, nullptr, nullptr};
    if (grad) {
        backward.grad = grad->matrix("rvq_encode: grad", grad->dtype), backward.grad_dtype = grad->dtype;
        LC_CHECK(grad->shape == x.shape, "rvq_encode: grad must have the shape of x");
        backward.grad_row_stride = grad->strides[0], backward.grad_column_stride = grad->strides[1];
    }
    if (scales) backward.scales = scales->whole<float>("rvq_encode: scales", DType::float32, {levels});
    backward.out = out.whole("rvq_encode: the gradient", p.dtype, {p.rows, p.dim});
    cuda::DriverQueue queue(kernels.module, stream);
    cuda::rvq_encode_backward(queue, backward);
}

inline void bind_rvq_encode_cuda(pybind11::module_& m) {
    m.def("rvq_encode_cuda", &rvq_encode_cuda);
    m.def("rvq_pack_cuda", &rvq_pack_cuda);
    m.def("rvq_encode_backward_cuda", &rvq_encode_backward_cuda);
}

}  // namespace longcat
