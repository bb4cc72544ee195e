// Kernels of a CUDA device from Python: a module is loaded once and handed to each call.
#pragma once

#include "bindings/tensor_view.h"
#include "cuda/driver.h"

namespace longcat {

// A module, and the device whose tensors it takes.
struct CudaModule {
    cuda::Module module;
    int device_index;

    CudaModule(std::string op, const std::string& cubin, int index)
        : module(std::move(op), cubin, index), device_index(index) {}
};

// Bytes -> a tensor of the device's memory, on the stream of the call, from the allocator of torch.
using CudaAllocate = pybind11::function;

// Calls `run(queue, workspace)` with the workspace that it asks for when given none.
template <class Run>
void run_with_workspace(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate, Run&& run) {
    cuda::DriverQueue queue(kernels.module, stream);
    const int64_t bytes = run(queue, static_cast<void*>(nullptr));
    const pybind11::object owner = allocate(bytes > 0 ? bytes : 1);  // until all is queued
    const auto workspace = owner.cast<CudaTensorView>();
    LC_CHECK(workspace.device == "cuda" && workspace.device_index == kernels.device_index && !workspace.shape.empty() &&
                 workspace.shape[0] >= bytes && workspace.is_contiguous(),
             "cuda: the workspace must be on the kernels' device and as large as asked for");
    pybind11::gil_scoped_release unlocked;
    run(queue, workspace.data);
}

inline void check_device(const char* op, const CudaModule& kernels, const CudaTensorView& tensor) {
    LC_CHECK(tensor.device_index == kernels.device_index,
             std::string(op) + ": tensors must be on the device of the kernels");
}

inline void bind_cuda(pybind11::module_& m) {
    namespace py = pybind11;
    m.def("cuda_why_not", &cuda::why_not_driver);
    py::class_<CudaModule>(m, "CudaModule")
        .def(py::init([](std::string op, const py::bytes& cubin, int device_index) {
                 return std::make_unique<CudaModule>(std::move(op), std::string(cubin), device_index);
             }),
             py::arg("op"), py::arg("cubin"), py::arg("device_index"));
}

}  // namespace longcat
