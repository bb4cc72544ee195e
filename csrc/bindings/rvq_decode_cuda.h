// Arguments of rvq_decode on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "cuda/rvq_decode_launch.h"

namespace longcat {

inline void rvq_decode_cuda(CudaModule& kernels, uintptr_t stream, const CudaTensorView& codes,
                            const std::vector<CudaTensorView>& codebooks, const CudaTensorView& out) {
    check_device("rvq_decode", kernels, codes);
    cuda::RvqDecode p{};
    p.codes = codes.matrix<int64_t>("rvq_decode: codes", DType::int64);
    p.rows = codes.shape[0], p.levels = codes.shape[1];
    p.row_stride = codes.strides[0], p.level_stride = codes.strides[1];
    LC_CHECK(p.levels >= 1 && p.levels == int64_t(codebooks.size()), "rvq_decode: codes must have a column a codebook");
    for (const CudaTensorView& book : codebooks) {
        const auto* words = book.matrix<float>("rvq_decode: codebooks", DType::float32);
        if (p.books.empty()) p.dim = book.shape[1];
        LC_CHECK(book.shape[1] == p.dim && (p.dim == 1 || book.strides[1] == 1),
                 "rvq_decode: codebooks must be equally wide, with adjacent elements");
        p.books.push_back({words, book.shape[0], book.strides[0]});
    }
    p.out = out.whole<float>("rvq_decode: the result", DType::float32, {p.rows, p.dim});
    cuda::DriverQueue queue(kernels.module, stream);
    cuda::rvq_decode(queue, p);
}

inline void rvq_decode_backward_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                                     const CudaTensorView& grad, const CudaTensorView& codes,
                                     const std::vector<CudaTensorView>& out) {
    check_device("rvq_decode", kernels, grad);
    cuda::RvqDecodeBackward p{};
    p.grad = grad.matrix("rvq_decode: grad", grad.dtype), p.dtype = grad.dtype;
    p.rows = grad.shape[0], p.dim = grad.shape[1], p.row_stride = grad.strides[0], p.column_stride = grad.strides[1];
    p.codes = codes.matrix<int64_t>("rvq_decode: codes", DType::int64);
    p.code_row_stride = codes.strides[0], p.code_level_stride = codes.strides[1];
    LC_CHECK(codes.shape[0] == p.rows && codes.shape[1] == int64_t(out.size()),
             "rvq_decode: codes must have the rows of grad and a column a codebook");
    for (const CudaTensorView& book : out) {
        LC_CHECK(book.shape.size() == 2, "rvq_decode: gradients must be matrices");
        p.entries.push_back(book.shape[0]);
        p.out.push_back(book.whole("rvq_decode: gradients", p.dtype, {book.shape[0], p.dim}));
    }
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_decode_backward(queue, p, workspace);
    });
}

inline void bind_rvq_decode_cuda(pybind11::module_& m) {
    m.def("rvq_decode_cuda", &rvq_decode_cuda);
    m.def("rvq_decode_backward_cuda", &rvq_decode_backward_cuda);
}

}  // namespace longcat
