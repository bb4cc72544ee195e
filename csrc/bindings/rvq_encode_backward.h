// Arguments of rvq_encode_backward from Python.
#pragma once

#include <optional>

#include "bindings/codebook.h"
#include "bindings/tensor_view.h"
#include "longcat/rvq_encode_backward.h"

namespace longcat {

// The arguments that every device's implementation has, checked.
template <class View>
RvqEncodeBackward rvq_encode_backward_params(const std::optional<View>& grad, const std::optional<View>& scales,
                                             const View& x, const View& codes, const std::vector<View>& codebooks,
                                             DType residual_dtype, const View& grad_x) {
    RvqEncodeBackward p{};
    p.dtype = x.dtype, p.residual_dtype = residual_dtype;
    p.x = {x.matrix("rvq_encode_backward: x", p.dtype), x.strides[0], x.strides[1]};
    p.rows = x.shape[0], p.dim = x.shape[1];
    LC_CHECK(is_float(p.dtype) && is_float(residual_dtype),
             "rvq_encode_backward: x and residual_dtype must be float32, bfloat16 or float16");
    if (grad) {
        p.grad = {grad->matrix("rvq_encode_backward: grad", p.dtype), grad->strides[0], grad->strides[1]};
        LC_CHECK(grad->shape == x.shape, "rvq_encode_backward: grad must have the shape of x");
    }
    for (const View& book : codebooks)
        p.codebooks.push_back(codebook_view("rvq_encode_backward: codebooks", book, p.dim, "x"));
    LC_CHECK(!codebooks.empty(), "rvq_encode_backward: the number of codebooks must be at least 1");
    const int64_t levels = int64_t(codebooks.size());
    if (scales) p.scales = scales->template whole<float>("rvq_encode_backward: scales", DType::float32, {levels});
    p.codes = codes.template whole<int64_t>("rvq_encode_backward: codes", DType::int64, {p.rows, levels});
    p.grad_x = grad_x.whole("rvq_encode_backward: grad_x", p.dtype, {p.rows, p.dim});
    return p;
}

inline void bind_rvq_encode_backward(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "rvq_encode_backward",
        [](const std::optional<TensorView>& grad, const std::optional<TensorView>& scales, const TensorView& x,
           const TensorView& codes, const std::vector<TensorView>& codebooks, DType residual_dtype,
           const TensorView& grad_x, int threads) {
            RvqEncodeBackward p = rvq_encode_backward_params(grad, scales, x, codes, codebooks, residual_dtype, grad_x);
            LC_CHECK(threads >= 1, "rvq_encode_backward: threads must be at least 1");
            p.threads = at_most_threads(threads);
            py::gil_scoped_release unlocked;
            rvq_encode_backward(p);
        },
        py::arg("grad"), py::arg("scales"), py::arg("x"), py::arg("codes"), py::arg("codebooks"),
        py::arg("residual_dtype"), py::arg("grad_x"), py::kw_only(), py::arg("threads"));
}

}  // namespace longcat
