// Arguments of rvq_decode and of its backward from Python.
#pragma once

#include "bindings/codebook.h"
#include "bindings/tensor_view.h"
#include "longcat/rvq_decode.h"

namespace longcat {

template <class View>
CodesView codes_view(const char* name, const View& codes, size_t levels) {
    const auto* data = codes.template matrix<const int64_t>(name, DType::int64);
    LC_CHECK(size_t(codes.shape[1]) == levels, std::string(name) + " must have one column a level");
    return {data, codes.shape[0], codes.shape[1], codes.strides[0], codes.strides[1]};
}

// The arguments that every device's implementation has, checked.
template <class View>
RvqDecode rvq_decode_params(const View& codes, const std::vector<View>& codebooks, const View& out) {
    RvqDecode p{};
    p.codes = codes_view("rvq_decode: codes", codes, codebooks.size());
    out.matrix("rvq_decode: out", DType::float32);
    p.dim = out.shape[1];
    for (const View& book : codebooks)
        p.codebooks.push_back(codebook_view("rvq_decode: codebooks", book, p.dim, "out"));
    p.out = out.template whole<float>("rvq_decode: out", DType::float32, {p.codes.rows, p.dim});
    return p;
}

template <class View>
RvqDecodeBackward rvq_decode_backward_params(const View& grad, const View& codes, const std::vector<View>& gradients) {
    RvqDecodeBackward p{};
    p.grad = grad.template matrix<const float>("rvq_decode_backward: grad", DType::float32);
    p.dim = grad.shape[1], p.row_stride = grad.strides[0];
    p.codes = codes_view("rvq_decode_backward: codes", codes, gradients.size());
    LC_CHECK(grad.shape[0] == p.codes.rows && (p.dim == 1 || grad.strides[1] == 1),
             "rvq_decode_backward: grad must have as many rows as codes, with adjacent elements");
    for (const View& gradient : gradients) {
        gradient.matrix("rvq_decode_backward: gradients", DType::float32);
        const int64_t entries = gradient.shape[0];
        p.gradients.push_back(
            {gradient.template whole<float>("rvq_decode_backward: gradients", DType::float32, {entries, p.dim}),
             entries});
    }
    return p;
}

inline void bind_rvq_decode(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "rvq_decode",
        [](const TensorView& codes, const std::vector<TensorView>& codebooks, const TensorView& out, int threads,
           const std::string& isa) {
            RvqDecode p = rvq_decode_params(codes, codebooks, out);
            LC_CHECK(threads >= 1, "rvq_decode: threads must be at least 1");
            p.threads = at_most_threads(threads);
            p.isa = isa_named(isa);
            py::gil_scoped_release unlocked;
            rvq_decode(p);
        },
        py::arg("codes"), py::arg("codebooks"), py::arg("out"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto");
    m.def(
        "rvq_decode_backward",
        [](const TensorView& grad, const TensorView& codes, const std::vector<TensorView>& gradients, int threads) {
            RvqDecodeBackward p = rvq_decode_backward_params(grad, codes, gradients);
            LC_CHECK(threads >= 1, "rvq_decode_backward: threads must be at least 1");
            p.threads = at_most_threads(threads);
            py::gil_scoped_release unlocked;
            rvq_decode_backward(p);
        },
        py::arg("grad"), py::arg("codes"), py::arg("gradients"), py::kw_only(), py::arg("threads"));
}

}  // namespace longcat
