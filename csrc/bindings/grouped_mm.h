// Arguments of grouped_mm from Python.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "longcat/grouped_mm.h"

namespace longcat {

// The last two axes of a tensor; the shorter way along one of them must be adjacent.
inline GroupedMM::Matrix last_two_axes(const TensorView& t) {
    const size_t row = t.shape.size() - 2, column = row + 1;
    GroupedMM::Matrix m{t.data, t.strides[row], t.strides[column]};
    if (t.shape[column] <= 1) m.column_stride = 1;
    if (t.shape[row] <= 1 && m.column_stride != 1) m.row_stride = 1;
    LC_CHECK(m.column_stride == 1 || m.row_stride == 1 || t.is_empty(),
             "grouped_mm: a and b must have adjacent elements in rows or columns");
    return m;
}

// Where each group ends; std::invalid_argument where an end decreases or leaves [0, extent].
inline std::vector<int64_t> ends_of(const TensorView& offs, int64_t extent) {
    const auto* data = offs.whole<int64_t>("grouped_mm: offs", DType::int64, {offs.shape.at(0)});
    const std::vector<int64_t> ends(data, data + offs.shape[0]);
    const auto text = [&] {
        std::string all;
        for (int64_t end : ends) all += (all.empty() ? "" : ", ") + std::to_string(end);
        return "[" + all + "]";
    };
    int64_t last = 0;
    for (int64_t end : ends) {
        LC_CHECK(end >= last && end <= extent,
                 "grouped_mm: offs must not decrease and lie in [0, " + std::to_string(extent) + "], got " + text());
        last = end;
    }
    return ends;
}

// The groups of two matrices by the axis that `ends` divides.
inline void set_groups(GroupedMM& p, const TensorView& a, const TensorView& b, const std::optional<TensorView>& offs,
                       const TensorView& out) {
    const bool batched_a = a.shape.size() == 3, batched_b = b.shape.size() == 3;
    const int64_t rows = a.shape[a.shape.size() - 2], depth = a.shape.back(), columns = b.shape.back();
    const int64_t extent = batched_a ? columns : batched_b ? rows : depth;
    const bool ragged = !(batched_a && batched_b);
    LC_CHECK(ragged == offs.has_value(), "grouped_mm: offs must be given unless a and b are 3-D");
    const auto ends = ragged ? ends_of(*offs, extent) : std::vector<int64_t>(size_t(a.shape[0]), 0);
    int64_t start = 0;
    for (size_t e = 0; e < ends.size(); ++e) {
        const auto i = int64_t(e);
        const int64_t size = ends[e] - start;
        GroupedMM::Group g{rows, columns, depth, 0, 0, 0};
        if (batched_a) g.a = i * a.strides[0];
        if (batched_b) g.b = i * b.strides[0];
        if (out.shape.size() == 3) g.out = i * rows * columns;
        if (batched_a && ragged) g.columns = size, g.b = start * p.b.column_stride, g.out = start;
        if (batched_b && ragged) g.rows = size, g.a = start * p.a.row_stride, g.out = start * columns;
        if (!batched_a && !batched_b) {
            g.depth = size;
            g.a = start * p.a.column_stride, g.b = start * p.b.row_stride;
        }
        p.groups.push_back(g);
        start = ends[e];
    }
    p.tail = {};
    if (batched_a && ragged) p.tail = {rows, columns - start, 0, 0, 0, start};
    if (batched_b && ragged) p.tail = {rows - start, columns, 0, 0, 0, start * columns};
}

inline void bind_grouped_mm(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "grouped_mm",
        [](const TensorView& a, const TensorView& b, const std::optional<TensorView>& offs, const TensorView& out,
           int threads, const std::string& isa, std::optional<DType> products) {
            GroupedMM p{};
            p.dtype = a.dtype;
            LC_CHECK(is_float(p.dtype) && b.dtype == a.dtype,
                     "grouped_mm: a and b must both be float32, bfloat16 or float16");
            p.products = product_dtype("grouped_mm: products", p.dtype, products);
            for (const TensorView* t : {&a, &b})
                LC_CHECK((t->shape.size() == 2 || t->shape.size() == 3) && t->device == "cpu",
                         "grouped_mm: a and b must be 2-D or 3-D tensors on the CPU");
            LC_CHECK(a.shape.back() == b.shape[b.shape.size() - 2],
                     "grouped_mm: b must have as many rows as a columns");
            LC_CHECK(threads >= 1, "grouped_mm: threads must be at least 1");
            p.a = last_two_axes(a), p.b = last_two_axes(b);
            p.threads = at_most_threads(threads), p.isa = isa_named(isa);
            set_groups(p, a, b, offs, out);
            const int64_t rows = a.shape[a.shape.size() - 2], columns = b.shape.back();
            void* data = a.shape.size() + b.shape.size() == 5
                             ? out.whole("grouped_mm: out", p.dtype, {rows, columns})
                             : out.whole("grouped_mm: out", p.dtype, {int64_t(p.groups.size()), rows, columns});
            p.out = {data, columns, 1};
            py::gil_scoped_release unlocked;
            grouped_mm(p);
        },
        py::arg("a"), py::arg("b"), py::arg("offs"), py::arg("out"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto", py::arg("products") = py::none());
}

}  // namespace longcat
