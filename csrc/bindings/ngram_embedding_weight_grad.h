// Arguments of ngram_embedding_weight_grad from Python.
#pragma once

#include "bindings/ngram_embedding.h"
#include "longcat/ngram_embedding_weight_grad.h"

namespace longcat {

inline NgramEmbeddingWeightGrad::Table weight_grad_table(const TensorView& rows, const TensorView& projection,
                                                         const TensorView& grad_rows, const TensorView& grad_projection,
                                                         DType dtype, int64_t dim) {
    NgramEmbeddingWeightGrad::Table table{};
    table.rows = embedding_rows("ngram_embedding_weight_grad: tables", rows, dtype);
    table.projection = embedding_rows("ngram_embedding_weight_grad: projections", projection, dtype);
    const int64_t width = table.rows.width;
    LC_CHECK(table.projection.rows == dim && table.projection.width == width,
             "ngram_embedding_weight_grad: projections must follow grad and their tables");
    grad_rows.matrix("ngram_embedding_weight_grad: grad_tables", dtype);
    table.size = grad_rows.shape[0];
    table.grad_rows = grad_rows.whole("ngram_embedding_weight_grad: grad_tables", dtype, {table.size, width});
    const int64_t sides = grad_projection.shape.empty() ? 0 : grad_projection.shape[0];
    void* data =
        grad_projection.whole("ngram_embedding_weight_grad: grad_projections", dtype, {sides == 0 ? 0 : dim, width});
    table.grad_projection = sides == 0 ? nullptr : data;
    return table;
}

inline void bind_ngram_embedding_weight_grad(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "ngram_embedding_weight_grad",
        [](const TensorView& grad, const TensorView& ids, const TensorView& hashes, const TensorView& slots,
           const std::vector<TensorView>& tables, const std::vector<TensorView>& projections,
           const std::array<int64_t, 6>& rule, const TensorView& grad_word, const std::vector<TensorView>& grad_tables,
           const std::vector<TensorView>& grad_projections, int threads, const std::string& isa) {
            NgramEmbeddingWeightGrad p{};
            set_ngram(p, "ngram_embedding_weight_grad: grad", grad.dtype, rule, threads, isa);
            p.grad = embedding_rows("ngram_embedding_weight_grad: grad", grad, p.dtype);
            ids.matrix("ngram_embedding_weight_grad: ids", DType::int64);
            p.ids = ids_view("ngram_embedding_weight_grad: ids", ids, ids.shape[0], ids.shape[1]);
            p.length = ids.shape[1];
            const auto count = int64_t(tables.size());
            LC_CHECK(ids.shape[0] * ids.shape[1] == p.grad.rows && projections.size() == tables.size() &&
                         grad_tables.size() == tables.size() && grad_projections.size() == tables.size(),
                     "ngram_embedding_weight_grad: grad must have a row for each id, and all lists one length");
            p.hashes = hashes.whole<const int64_t>("ngram_embedding_weight_grad: hashes", DType::int64,
                                                   {ids.shape[0], ids.shape[1], count});
            p.slots = slots.whole<const int64_t>("ngram_embedding_weight_grad: slots", DType::int64,
                                                 {ids.shape[0], ids.shape[1], count});
            for (size_t i = 0; i < tables.size(); ++i)
                p.tables.push_back(weight_grad_table(tables[i], projections[i], grad_tables[i], grad_projections[i],
                                                     p.dtype, p.grad.width));
            grad_word.matrix("ngram_embedding_weight_grad: grad_word", p.dtype);
            p.words = grad_word.shape[0];
            p.grad_word = grad_word.whole("ngram_embedding_weight_grad: grad_word", p.dtype, {p.words, p.grad.width});
            py::gil_scoped_release unlocked;
            ngram_embedding_weight_grad(p);
        },
        py::arg("grad"), py::arg("ids"), py::arg("hashes"), py::arg("slots"), py::arg("tables"), py::arg("projections"),
        py::arg("rule"), py::arg("grad_word"), py::arg("grad_tables"), py::arg("grad_projections"), py::kw_only(),
        py::arg("threads"), py::arg("isa") = "auto");
}

}  // namespace longcat
