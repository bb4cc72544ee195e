// Arguments of rvq_encode from Python.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "longcat/rvq_encode.h"

namespace longcat {

// The arguments that every device's implementation has, checked: a kernel trusts them. `View` is TensorView, or that of
// another device.
template <class View>
RvqEncode rvq_encode_params(const View& x, const std::vector<View>& codebooks, const std::optional<View>& mask,
                            DType residual_dtype, const View& quantized, const View& residual, const View& losses,
                            const View& codes) {
    RvqEncode p{};
    p.x = x.matrix("rvq_encode: x", x.dtype), p.dtype = x.dtype;
    p.rows = x.shape[0], p.dim = x.shape[1], p.row_stride = x.strides[0], p.column_stride = x.strides[1];
    LC_CHECK(p.dim >= 1, "rvq_encode: x must have at least one column");
    for (const View& book : codebooks) {
        const auto* words = book.template matrix<float>("rvq_encode: codebooks", DType::float32);
        LC_CHECK(book.shape[0] >= 1 && book.shape[1] == p.dim && (p.dim == 1 || book.strides[1] == 1),
                 "rvq_encode: codebooks must have rows, as wide as x, with adjacent elements");
        p.levels.push_back({words, book.shape[0], book.strides[0]});
    }
    LC_CHECK(is_float(p.dtype) && is_float(residual_dtype),
             "rvq_encode: x and residual_dtype must be float32, bfloat16 or float16");
    const int64_t levels = int64_t(p.levels.size());
    p.mask = mask ? mask->template whole<bool>("rvq_encode: mask", DType::boolean, {p.rows}) : nullptr;
    p.residual_dtype = residual_dtype;
    p.quantized = quantized.whole("rvq_encode: quantized", p.dtype, {p.rows, p.dim});
    p.residual = residual.template whole<float>("rvq_encode: residual", DType::float32, {p.rows, p.dim});
    p.losses = losses.template whole<float>("rvq_encode: losses", DType::float32, {levels});
    p.codes = codes.template whole<int64_t>("rvq_encode: codes", DType::int64, {p.rows, levels});
    return p;
}

inline void bind_rvq_encode(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "rvq_encode",
        [](const TensorView& x, const std::vector<TensorView>& codebooks, const std::optional<TensorView>& mask,
           DType residual_dtype, const TensorView& quantized, const TensorView& residual, const TensorView& losses,
           const TensorView& codes, int threads, const std::string& isa) {
            RvqEncode p = rvq_encode_params(x, codebooks, mask, residual_dtype, quantized, residual, losses, codes);
            LC_CHECK(threads >= 1, "rvq_encode: threads must be at least 1");
            p.threads = at_most_threads(threads), p.isa = isa_named(isa);
            py::gil_scoped_release unlocked;
            rvq_encode(p);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("mask"), py::arg("residual_dtype"), py::arg("quantized"),
        py::arg("residual"), py::arg("losses"), py::arg("codes"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto");
}

}  // namespace longcat
