// Arguments of the two backward passes of fused_moe from Python.
#pragma once

#include "bindings/fused_moe.h"
#include "longcat/fused_moe_backward.h"

namespace longcat {

inline void bind_fused_moe_backward(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "fused_moe_input_grad",
        [](const TensorView& grad, const TensorView& x, const TensorView& gate_up, const TensorView& down,
           const TensorView& ids, const TensorView& weights, const TensorView& hidden, const TensorView& grad_x,
           const TensorView& grad_weights, const TensorView& grad_hidden, int threads, const std::string& isa,
           std::optional<DType> products) {
            FusedMoeInputGrad p{};
            set_moe(p, x, ids, weights, threads, isa, products);
            const int64_t dim = p.dim;
            set_experts(p, gate_up, down, p.dtype);
            LC_CHECK(dim == p.dim, "fused_moe_input_grad: down must be as wide as x");
            p.grad = moe_rows("fused_moe_input_grad: grad", grad, p.dtype, p.tokens, p.dim);
            p.hidden_rows = hidden_rows("fused_moe_input_grad: hidden", hidden, p.dtype, p.width);
            p.hidden = hidden.data;
            p.grad_x = grad_x.whole("fused_moe_input_grad: grad_x", p.dtype, {p.tokens, p.dim});
            p.grad_weights =
                grad_weights.whole<float>("fused_moe_input_grad: grad_weights", DType::float32, {p.tokens, p.slots});
            p.grad_hidden =
                grad_hidden.whole("fused_moe_input_grad: grad_hidden", p.dtype, {p.hidden_rows, 2 * p.width});
            py::gil_scoped_release unlocked;
            fused_moe_input_grad(p);
        },
        py::arg("grad"), py::arg("x"), py::arg("gate_up"), py::arg("down"), py::arg("ids"), py::arg("weights"),
        py::arg("hidden"), py::arg("grad_x"), py::arg("grad_weights"), py::arg("grad_hidden"), py::kw_only(),
        py::arg("threads"), py::arg("isa") = "auto", py::arg("products") = py::none());

    m.def(
        "fused_moe_weight_grad",
        [](const TensorView& grad, const TensorView& x, const TensorView& ids, const TensorView& weights,
           const TensorView& hidden, const TensorView& grad_hidden, const std::optional<TensorView>& grad_gate_up,
           const std::optional<TensorView>& grad_down, bool add, int threads, const std::string& isa,
           std::optional<DType> products) {
            FusedMoeWeightGrad p{};
            set_moe(p, x, ids, weights, threads, isa, products);
            LC_CHECK(hidden.shape.size() == 2 && (grad_gate_up || grad_down),
                     "fused_moe_weight_grad: hidden must have two axes, and a gradient must be wanted");
            p.width = hidden.shape[1] / 2, p.add = add;
            const TensorView& either = grad_gate_up ? *grad_gate_up : *grad_down;
            p.experts = either.shape.at(0), p.grad_dtype = either.dtype;
            p.grad = moe_rows("fused_moe_weight_grad: grad", grad, p.dtype, p.tokens, p.dim);
            p.hidden_rows = hidden_rows("fused_moe_weight_grad: hidden", hidden, p.dtype, p.width);
            p.hidden = hidden.data;
            p.grad_hidden =
                grad_hidden.whole("fused_moe_weight_grad: grad_hidden", p.dtype, {p.hidden_rows, 2 * p.width});
            LC_CHECK(is_float(p.grad_dtype), "fused_moe_weight_grad: gradients must be float32, bfloat16 or float16");
            if (grad_gate_up)
                p.grad_gate_up = grad_gate_up->whole("fused_moe_weight_grad: grad_gate_up", p.grad_dtype,
                                                     {p.experts, 2 * p.width, p.dim});
            if (grad_down)
                p.grad_down =
                    grad_down->whole("fused_moe_weight_grad: grad_down", p.grad_dtype, {p.experts, p.dim, p.width});
            py::gil_scoped_release unlocked;
            fused_moe_weight_grad(p);
        },
        py::arg("grad"), py::arg("x"), py::arg("ids"), py::arg("weights"), py::arg("hidden"), py::arg("grad_hidden"),
        py::arg("grad_gate_up"), py::arg("grad_down"), py::arg("add"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto", py::arg("products") = py::none());
}

}  // namespace longcat
