// Arguments of rvq_encode from Python.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "longcat/rvq_encode.h"

namespace longcat {

inline void bind_rvq_encode(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "rvq_encode",
        [](const TensorView& x, const std::vector<TensorView>& codebooks, const std::optional<TensorView>& mask,
           DType residual_dtype, const TensorView& quantized, const TensorView& residual, const TensorView& losses,
           const TensorView& codes, int threads, const std::string& isa) {
            RvqEncode p{};
            p.rows = x.shape.at(0), p.dim = x.shape.at(1);
            p.x = x.data, p.dtype = x.dtype;
            p.row_stride = x.strides.at(0), p.column_stride = x.strides.at(1);
            for (const TensorView& book : codebooks) {
                LC_CHECK(book.shape.at(1) == p.dim && (p.dim == 1 || book.strides.at(1) == 1),
                         "rvq_encode: codebooks must be as wide as x is, with adjacent elements");
                p.levels.push_back({book.as<float>(DType::float32), book.shape[0], book.strides[0]});
            }
            LC_CHECK(!mask || mask->is_contiguous(), "rvq_encode: mask must be contiguous");
            LC_CHECK(threads >= 1, "rvq_encode: threads must be at least 1");
            p.mask = mask ? mask->as<bool>(DType::boolean) : nullptr;
            p.residual_dtype = residual_dtype, p.threads = threads, p.isa = isa_named(isa);
            p.quantized = quantized.data, p.residual = residual.as<float>(DType::float32);
            p.losses = losses.as<float>(DType::float32), p.codes = codes.as<int64_t>(DType::int64);
            py::gil_scoped_release unlocked;
            rvq_encode(p);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("mask"), py::arg("residual_dtype"), py::arg("quantized"),
        py::arg("residual"), py::arg("losses"), py::arg("codes"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto");
}

}  // namespace longcat
