// Arguments of ngram_embedding from Python.
#pragma once

#include <array>
#include <optional>

#include "bindings/tensor_view.h"
#include "longcat/ngram_embedding.h"

namespace longcat {

inline IdsView ids_view(const char* name, const std::optional<TensorView>& ids, int64_t batch, int64_t places) {
    if (!ids) return {nullptr, 0, 0};
    const auto* data = ids->matrix<const int64_t>(name, DType::int64);
    LC_CHECK(ids->shape[0] == batch && ids->shape[1] == places, std::string(name) + " must follow the shape of ids");
    return {data, ids->strides[0], ids->strides[1]};
}

inline NgramEmbedding::Matrix embedding_rows(const char* name, const TensorView& rows, DType dtype) {
    const auto* data = rows.matrix(name, dtype);
    LC_CHECK(rows.shape[1] <= 1 || rows.strides[1] == 1, std::string(name) + " must have adjacent elements");
    return {data, rows.shape[0], rows.shape[1], rows.strides[0]};
}

// What both directions share: rule, dtype, threads.
template <class Pass>
void set_ngram(Pass& p, const char* name, DType dtype, const std::array<int64_t, 6>& rule, int threads,
               const std::string& isa) {
    p.rule = {rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]};
    LC_CHECK(dtype == DType::float32 || dtype == DType::bfloat16, std::string(name) + " must be float32 or bfloat16");
    LC_CHECK(threads >= 1, "ngram_embedding: threads must be at least 1");
    p.dtype = dtype, p.threads = at_most_threads(threads), p.isa = isa_named(isa);
}

inline void bind_ngram_embedding(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "ngram_embedding",
        [](const TensorView& ids, const TensorView& word, const std::vector<TensorView>& tables,
           const std::vector<TensorView>& projections, const std::optional<TensorView>& documents,
           const std::optional<TensorView>& history, const std::array<int64_t, 6>& rule, const TensorView& out,
           const TensorView& hashes, int threads, const std::string& isa) {
            NgramEmbedding p{};
            set_ngram(p, "ngram_embedding: word", word.dtype, rule, threads, isa);
            const auto count = (p.rule.neighbors - 1) * p.rule.splits;
            LC_CHECK(p.rule.neighbors >= 2 && p.rule.splits >= 1 && p.rule.base >= 1 &&
                         int64_t(tables.size()) == count && int64_t(projections.size()) == count,
                     "ngram_embedding: tables and projections must be as many as the rule says");
            ids.matrix("ngram_embedding: ids", DType::int64);
            p.batch = ids.shape[0], p.length = ids.shape[1];
            p.ids = ids_view("ngram_embedding: ids", ids, p.batch, p.length);
            p.documents = ids_view("ngram_embedding: documents", documents, p.batch, p.length);
            p.history = ids_view("ngram_embedding: history", history, p.batch, p.rule.neighbors - 1);
            p.word = embedding_rows("ngram_embedding: word", word, p.dtype);
            p.dim = p.word.width;
            for (size_t i = 0; i < tables.size(); ++i) {
                p.tables.push_back({embedding_rows("ngram_embedding: tables", tables[i], p.dtype),
                                    embedding_rows("ngram_embedding: projections", projections[i], p.dtype)});
                const NgramEmbedding::Table& table = p.tables.back();
                LC_CHECK(table.rows.rows >= 1 && table.projection.rows == p.dim &&
                             table.projection.width == table.rows.width,
                         "ngram_embedding: projections must follow word and their tables");
            }
            p.out = out.whole("ngram_embedding: out", p.dtype, {p.batch, p.length, p.dim});
            p.hashes = hashes.whole<int64_t>("ngram_embedding: hashes", DType::int64, {p.batch, p.length, count});
            py::gil_scoped_release unlocked;
            ngram_embedding(p);
        },
        py::arg("ids"), py::arg("word"), py::arg("tables"), py::arg("projections"), py::arg("documents"),
        py::arg("history"), py::arg("rule"), py::arg("out"), py::arg("hashes"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto");
}

}  // namespace longcat
