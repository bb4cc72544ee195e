// Arguments of fused_moe from Python, and of what packs its weights.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "longcat/fused_moe.h"

namespace longcat {

// Rows of a matrix of this shape and type.
inline MoeRows moe_rows(const char* name, const TensorView& t, DType dtype, int64_t rows, int64_t dim) {
    t.matrix(name, dtype);
    LC_CHECK(t.shape[0] == rows && t.shape[1] == dim && (dim <= 1 || rows == 0 || t.strides[1] == 1),
             std::string(name) + " must have the shape that the others give and adjacent elements in rows");
    return {t.data, t.strides[0]};
}

// One matrix an expert, of this shape and type.
inline MoeMatrices moe_matrices(const char* name, const TensorView& t, DType dtype, int64_t experts, int64_t rows,
                                int64_t columns) {
    LC_CHECK(t.device == "cpu" && t.dtype == dtype && t.shape == (std::vector<int64_t>{experts, rows, columns}) &&
                 (columns <= 1 || t.is_empty() || t.strides[2] == 1),
             std::string(name) +
                 " must be on the CPU, of x's dtype and the shape that the others give, and have "
                 "adjacent elements in rows");
    return {t.data, t.strides[0], t.strides[1]};
}

// What all passes share: sizes, routing, threads.
template <class Pass>
void set_moe(Pass& p, const TensorView& x, const TensorView& ids, const TensorView& weights, int threads,
             const std::string& isa, std::optional<DType> products) {
    p.dtype = x.dtype;
    LC_CHECK(is_float(p.dtype), "fused_moe: x must be float32, bfloat16 or float16");
    p.products = product_dtype("fused_moe: products", p.dtype, products);
    ids.matrix("fused_moe: ids", DType::int64);
    p.tokens = ids.shape[0], p.slots = ids.shape[1];
    LC_CHECK(p.slots >= 1 && x.shape.size() == 2, "fused_moe: ids must have at least one column, and x two axes");
    p.dim = x.shape[1];
    p.x = moe_rows("fused_moe: x", x, p.dtype, p.tokens, p.dim);
    p.ids = ids.whole<int64_t>("fused_moe: ids", DType::int64, {p.tokens, p.slots});
    p.weights = weights.whole<float>("fused_moe: weights", DType::float32, {p.tokens, p.slots});
    LC_CHECK(threads >= 1, "fused_moe: threads must be at least 1");
    p.threads = at_most_threads(threads), p.isa = isa_named(isa);
}

// Sizes of the weights, and the weights.
template <class Pass>
void set_experts(Pass& p, const TensorView& gate_up, const TensorView& down, DType dtype) {
    LC_CHECK(down.shape.size() == 3, "fused_moe: down must have three axes");
    p.experts = down.shape[0], p.dim = down.shape[1], p.width = down.shape[2];
    LC_CHECK(p.experts >= 1, "fused_moe: down must have at least one expert");
    p.gate_up = moe_matrices("fused_moe: gate_up", gate_up, dtype, p.experts, 2 * p.width, p.dim);
    p.down = moe_matrices("fused_moe: down", down, dtype, p.experts, p.dim, p.width);
}

// The rows of `hidden`.
inline int64_t hidden_rows(const char* name, const TensorView& hidden, DType dtype, int64_t width) {
    LC_CHECK(hidden.shape.size() == 2, std::string(name) + " must have two axes");
    hidden.whole(name, dtype, {hidden.shape[0], 2 * width});
    return hidden.shape[0];
}

inline void set_packed(FusedMoe& p, const std::vector<TensorView>& packed) {
    if (packed.empty()) return;
    LC_CHECK(packed.size() == 2, "fused_moe: packed must be two tensors or none");
    int64_t bytes[2];
    packed_experts_bytes(p.experts, p.dim, p.width, p.products, p.isa, bytes);
    for (int i = 0; i < 2; ++i) p.packed[i] = packed[size_t(i)].whole("fused_moe: packed", DType::uint8, {bytes[i]});
}

inline void bind_fused_moe(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "fused_moe",
        [](const TensorView& x, const TensorView& gate_up, const TensorView& down, const TensorView& ids,
           const TensorView& weights, const std::optional<TensorView>& residual, const std::vector<TensorView>& packed,
           const std::optional<TensorView>& out, const std::optional<TensorView>& hidden, int threads,
           const std::string& isa, std::optional<DType> products) {
            FusedMoe p{};
            set_moe(p, x, ids, weights, threads, isa, products);
            const int64_t dim = p.dim;
            set_experts(p, gate_up, down, p.dtype);
            LC_CHECK(dim == p.dim, "fused_moe: down must be as wide as x");
            set_packed(p, packed);
            if (residual) p.residual = moe_rows("fused_moe: residual", *residual, p.dtype, p.tokens, p.dim);
            if (out) p.out = out->whole("fused_moe: out", p.dtype, {p.tokens, p.dim});
            if (hidden) {
                p.hidden_rows = hidden_rows("fused_moe: hidden", *hidden, p.dtype, p.width);
                p.hidden = hidden->data;
            }
            py::gil_scoped_release unlocked;
            fused_moe(p);
        },
        py::arg("x"), py::arg("gate_up"), py::arg("down"), py::arg("ids"), py::arg("weights"), py::arg("residual"),
        py::arg("packed"), py::arg("out"), py::arg("hidden"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto", py::arg("products") = py::none());

    m.def(
        "packed_experts_bytes",
        [](int64_t experts, int64_t dim, int64_t width, DType products) {
            int64_t bytes[2];
            packed_experts_bytes(experts, dim, width, products, isa_named("auto"), bytes);
            return std::pair(bytes[0], bytes[1]);
        },
        py::arg("experts"), py::arg("dim"), py::arg("width"), py::arg("products"));
    m.def(
        "pack_experts",
        [](const TensorView& gate_up, const TensorView& down, const TensorView& first, const TensorView& second,
           int threads, std::optional<DType> products) {
            PackExperts p{};
            p.dtype = down.dtype, p.isa = isa_named("auto");
            LC_CHECK(is_float(p.dtype) && threads >= 1, "pack_experts: weights must be float32, bfloat16 or float16");
            p.products = product_dtype("pack_experts: products", p.dtype, products);
            set_experts(p, gate_up, down, p.dtype);
            int64_t bytes[2];
            packed_experts_bytes(p.experts, p.dim, p.width, p.products, p.isa, bytes);
            p.packed[0] = first.whole("pack_experts: packed", DType::uint8, {bytes[0]});
            p.packed[1] = second.whole("pack_experts: packed", DType::uint8, {bytes[1]});
            p.threads = at_most_threads(threads);
            py::gil_scoped_release unlocked;
            pack_experts(p);
        },
        py::arg("gate_up"), py::arg("down"), py::arg("packed_gate_up"), py::arg("packed_down"), py::kw_only(),
        py::arg("threads"), py::arg("products") = py::none());
}

}  // namespace longcat
