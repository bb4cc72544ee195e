// Arguments of depth_decode on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "cuda/depth_decode_launch.h"

namespace longcat {

using OptionalCudaView = std::optional<CudaTensorView>;

// Pointers and strides of weights whose rows have adjacent elements; empty ones are absent.
inline std::vector<cuda::DepthTensor> depth_tensors(const std::vector<CudaTensorView>& weights, DType dtype) {
    std::vector<cuda::DepthTensor> tensors;
    for (size_t i = 0; i < weights.size(); ++i) {
        const CudaTensorView& w = weights[i];
        cuda::DepthTensor tensor = {w.is_empty() ? nullptr : w.data, {}};
        const DType wanted = i == 4 ? DType::float32 : dtype;  // the fifth is rope
        const bool adjacent = w.shape.empty() || w.shape.back() <= 1 || w.strides.back() == 1;
        LC_CHECK(w.is_empty() || (w.device == "cuda" && w.dtype == wanted && adjacent && w.shape.size() <= 3),
                 "depth_decode: weights must be on the GPU, of hidden's dtype, their rows' elements adjacent");
        for (size_t axis = 0; axis < w.strides.size() && axis < 3; ++axis) tensor.strides[axis] = w.strides[axis];
        tensors.push_back(tensor);
    }
    return tensors;
}

template <class To, class From>
const To* elements(const OptionalCudaView& view, const char* name, DType dtype, std::initializer_list<int64_t> sides) {
    return view ? reinterpret_cast<const To*>(view->whole<From>(name, dtype, sides)) : nullptr;
}

inline void depth_decode_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                              const CudaTensorView& hidden, const std::vector<CudaTensorView>& weights,
                              const CudaTensorView& params, const CudaTensorView& seeds, const CudaTensorView& steps,
                              const OptionalCudaView& start, const OptionalCudaView& prefix,
                              const OptionalCudaView& active, const OptionalCudaView& leaders,
                              const OptionalCudaView& history, const OptionalCudaView& offsets,
                              const std::vector<int64_t>& config, double eps, bool wants_logits,
                              const CudaTensorView& logprobs, const CudaTensorView& drawn_logprobs,
                              const CudaTensorView& embedding, const CudaTensorView& logits,
                              const CudaTensorView& codes) {
    check_device("depth_decode", kernels, hidden);
    LC_CHECK(is_float(hidden.dtype), "depth_decode: hidden must be float32, bfloat16 or float16");
    using cuda::i64;
    const DType type = hidden.dtype;
    cuda::DepthKernel p = cuda::depth_kernel(config, float(eps), depth_tensors(weights, type));
    LC_CHECK(hidden.shape.size() == 2, "depth_decode: hidden must be a matrix");
    const int64_t rows = hidden.shape[0], levels = p.levels;
    LC_CHECK(rows <= cuda::kMmaRows, "depth_decode: the CUDA kernels take at most 256 rows");
    p.rows = int(rows), p.type = int(type);
    p.hidden_rows = hidden.whole("depth_decode: hidden", type, {rows, p.hidden});
    p.start = elements<void, void>(start, "depth_decode: start", type, {rows, p.dim});
    LC_CHECK(params.device == "cuda" && params.dtype == DType::float32 && params.shape.size() == 3 &&
                 params.shape == std::vector<int64_t>({rows, levels, 8}) && params.strides[2] == 1,
             "depth_decode: sampling must be float32 [T, L, 8] on the GPU, the numbers of a draw adjacent");
    p.params = static_cast<const float*>(params.data), p.params_row = params.strides[0];
    p.params_level = params.strides[1];
    p.seeds = reinterpret_cast<i64*>(seeds.whole<int64_t>("depth_decode: seed", DType::int64, {rows}));
    LC_CHECK(steps.device == "cuda" && steps.dtype == DType::int64 && steps.shape == std::vector<int64_t>({rows}),
             "depth_decode: step must be int64 [T] on the GPU");
    p.steps = static_cast<const i64*>(steps.data), p.step_stride = steps.strides[0];
    p.prefix_width = p.prefix_row = prefix && prefix->shape.size() == 2 ? prefix->shape[1] : 0;
    p.prefix = elements<i64, int64_t>(prefix, "depth_decode: prefix", DType::int64, {rows, p.prefix_width});
    p.active = elements<bool, bool>(active, "depth_decode: active", DType::boolean, {rows});
    p.leaders = elements<i64, int64_t>(leaders, "depth_decode: pairs", DType::int64, {rows});
    p.history_rows = history && !history->shape.empty() ? history->shape[0] : 0;
    p.history = elements<i64, int64_t>(history, "depth_decode: history", DType::int64, {p.history_rows, levels});
    p.offsets = elements<i64, int64_t>(offsets, "depth_decode: offsets", DType::int64, {rows + 1});
    if (p.offsets == nullptr) p.history = nullptr;
    p.logprobs = logprobs.whole<float>("depth_decode: logprobs", DType::float32, {rows, levels});
    p.drawn_logprobs = drawn_logprobs.whole<float>("depth_decode: drawn_logprobs", DType::float32, {rows, levels});
    p.embedding = embedding.whole("depth_decode: embedding", type, {rows, p.width});
    p.codes = reinterpret_cast<i64*>(codes.whole<int64_t>("depth_decode: codes", DType::int64, {rows, levels}));
    p.logits =
        wants_logits ? logits.whole<float>("depth_decode: logits", DType::float32, {rows, p.logit_width}) : nullptr;
    run_with_workspace(kernels, stream, allocate,
                       [&](cuda::Queue& queue, void* workspace) { return cuda::depth_decode(queue, p, workspace); });
}

inline void bind_depth_decode_cuda(pybind11::module_& m) {
    m.def("depth_decode_cuda", &depth_decode_cuda);
    m.def("depth_most_rows_cuda", [](int major, int minor, const std::vector<int64_t>& config, DType dtype) {
        return cuda::depth_most_rows({0, major, minor}, config, int(dtype));
    });
}

}  // namespace longcat
