// Arguments of moe_plan from Python.
#pragma once

#include "bindings/tensor_view.h"
#include "longcat/moe_plan.h"

namespace longcat {

inline void bind_moe_plan(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "moe_plan",
        [](const TensorView& ids, int64_t tile, const TensorView& counts, const TensorView& offsets,
           const TensorView& tokens, const TensorView& slots, const TensorView& rows, const TensorView& tiles) {
            MoePlan p{};
            ids.matrix("moe_plan: ids", DType::int64);
            p.tokens = ids.shape[0], p.slots = ids.shape[1];
            const int64_t experts = counts.shape.at(0), total = p.tokens * p.slots, height = tiles.shape.at(0);
            LC_CHECK(tile >= 1 && experts >= 1 && p.slots >= 1, "moe_plan: tile, n_real and k must be at least 1");
            LC_CHECK(height >= experts + (total + tile - 1) / tile, "moe_plan: tiles must have room for all");
            p.experts = experts, p.ids = ids.whole<int64_t>("moe_plan: ids", DType::int64, {p.tokens, p.slots});
            auto* count = counts.whole<int32_t>("moe_plan: counts", DType::int32, {experts});
            p.offsets = offsets.whole<int32_t>("moe_plan: offsets", DType::int32, {experts + 1});
            p.token = tokens.whole<int32_t>("moe_plan: tokens", DType::int32, {total});
            p.slot = slots.whole<int32_t>("moe_plan: slots", DType::int32, {total});
            p.row = rows.whole<int32_t>("moe_plan: rows", DType::int32, {p.tokens, p.slots});
            auto* out = tiles.whole<int32_t>("moe_plan: tiles", DType::int32, {height, 2});
            py::gil_scoped_release unlocked;
            moe_plan(p);
            for (int64_t e = 0; e < experts; ++e) count[e] = p.offsets[e + 1] - p.offsets[e];
            moe_tiles(p.offsets, experts, tile, height, out);
        },
        py::arg("ids"), py::arg("tile"), py::arg("counts"), py::arg("offsets"), py::arg("tokens"), py::arg("slots"),
        py::arg("rows"), py::arg("tiles"));
}

}  // namespace longcat
