// Arguments of rvq_decode and of its backward on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "bindings/rvq_decode.h"
#include "cuda/rvq_decode_launch.h"

namespace longcat {

inline void rvq_decode_cuda(CudaModule& kernels, uintptr_t stream, const CudaTensorView& codes,
                            const std::vector<CudaTensorView>& codebooks, const CudaTensorView& out) {
    check_device("rvq_decode", kernels, codes);
    const RvqDecode p = rvq_decode_params(codes, codebooks, out);
    cuda::DriverQueue queue(kernels.module, stream);
    cuda::rvq_decode(queue, p);
}

inline void rvq_decode_backward_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                                     const CudaTensorView& grad, const CudaTensorView& codes,
                                     const std::vector<CudaTensorView>& gradients) {
    check_device("rvq_decode", kernels, grad);
    const RvqDecodeBackward p = rvq_decode_backward_params(grad, codes, gradients);
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::rvq_decode_backward(queue, p, workspace);
    });
}

inline void bind_rvq_decode_cuda(pybind11::module_& m) {
    m.def("rvq_decode_cuda", &rvq_decode_cuda);
    m.def("rvq_decode_backward_cuda", &rvq_decode_backward_cuda);
}

}  // namespace longcat
