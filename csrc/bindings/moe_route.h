// Arguments of moe_route from Python.
#pragma once

#include "bindings/tensor_view.h"
#include "longcat/moe_route.h"

namespace longcat {

inline void bind_moe_route(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "moe_route",
        [](const TensorView& scores, const TensorView& choice, bool renorm, float scale, const TensorView& weights,
           const TensorView& ids, int threads) {
            MoeRoute p{};
            scores.matrix("moe_route: scores", DType::float32);
            ids.matrix("moe_route: ids", DType::int64);
            p.tokens = scores.shape[0], p.experts = scores.shape[1], p.slots = ids.shape[1];
            LC_CHECK(p.slots <= p.experts && threads >= 1, "moe_route: k must be at most the number of experts");
            p.scores = scores.whole<float>("moe_route: scores", DType::float32, {p.tokens, p.experts});
            p.choice = choice.whole<float>("moe_route: choice", DType::float32, {p.tokens, p.experts});
            p.weights = weights.whole<float>("moe_route: weights", DType::float32, {p.tokens, p.slots});
            p.ids = ids.whole<int64_t>("moe_route: ids", DType::int64, {p.tokens, p.slots});
            p.renorm = renorm, p.scale = scale, p.threads = at_most_threads(threads);
            py::gil_scoped_release unlocked;
            moe_route(p);
        },
        py::arg("scores"), py::arg("choice"), py::arg("renorm"), py::arg("scale"), py::arg("weights"), py::arg("ids"),
        py::kw_only(), py::arg("threads"));
}

}  // namespace longcat
