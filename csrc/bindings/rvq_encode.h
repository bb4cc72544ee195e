// Arguments of rvq_encode from Python, and of what prepares a codebook for it.
#pragma once

#include <optional>

#include "bindings/codebook.h"
#include "bindings/tensor_view.h"
#include "longcat/rvq_encode.h"

namespace longcat {

// The codewords that are packed, [entries, dim].
template <class View>
Codebook words_view(const View& words) {
    words.matrix("rvq_encode: words", DType::float32);
    LC_CHECK(words.shape[0] >= 1 && words.shape[1] >= 1, "rvq_encode: words must have at least one element");
    return codebook_view("rvq_encode: words", words, words.shape[1], "itself");
}

// A view of packed bytes, whatever they hold.
inline PackedCodebook packed_bytes_of(const TensorView& packed, int64_t entries, int64_t dim, Isa isa) {
    auto* memory = packed.whole<void>("rvq_encode: packed", DType::uint8, {packed_bytes(entries, dim, isa)});
    LC_CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "rvq_encode: packed must lie on a 64-byte boundary");
    return packed_view(memory, entries, dim, isa);
}

// The packed form of a codebook, by the instruction set that it was packed for.
inline PackedCodebook packed_codebook(const TensorView& packed, int64_t entries, int64_t dim) {
    for (Isa isa : isas_here()) {
        if (packed.shape.size() != 1 || packed.shape[0] != packed_bytes(entries, dim, isa)) continue;
        const PackedCodebook view = packed_bytes_of(packed, entries, dim, isa);
        if (is_packed(view)) return view;
    }
    throw std::invalid_argument("rvq_encode: packed must be the packed form of the codebook beside it");
}

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
        p.levels.push_back(codebook_view("rvq_encode: codebooks", book, p.dim, "x"));
        LC_CHECK(book.shape[0] >= 1, "rvq_encode: codebooks must have at least one row");
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
        [](const TensorView& x, const std::vector<TensorView>& codebooks, const std::vector<TensorView>& packed,
           const std::optional<TensorView>& gram, const std::optional<TensorView>& mask, DType residual_dtype,
           const TensorView& quantized, const TensorView& residual, const TensorView& losses, const TensorView& codes,
           int threads, const std::string& isa) {
            RvqEncode p = rvq_encode_params(x, codebooks, mask, residual_dtype, quantized, residual, losses, codes);
            LC_CHECK(packed.empty() || packed.size() == p.levels.size(), "rvq_encode: packed must be one a level");
            for (size_t level = 0; level < packed.size(); ++level)
                p.packed.push_back(packed_codebook(packed[level], p.levels[level].entries, p.dim));
            if (gram) {
                LC_CHECK(!p.packed.empty(), "rvq_encode: gram needs the packed codebook");
                p.gram =
                    gram->whole<float>("rvq_encode: gram", DType::float32, {p.packed[0].entries, p.packed[0].padded});
            }
            LC_CHECK(threads >= 1, "rvq_encode: threads must be at least 1");
            p.threads = at_most_threads(threads), p.isa = isa_named(isa);
            py::gil_scoped_release unlocked;
            rvq_encode(p);
        },
        py::arg("x"), py::arg("codebooks"), py::arg("packed"), py::arg("gram"), py::arg("mask"),
        py::arg("residual_dtype"), py::arg("quantized"), py::arg("residual"), py::arg("losses"), py::arg("codes"),
        py::kw_only(), py::arg("threads"), py::arg("isa") = "auto");

    m.def(
        "packed_bytes",
        [](int64_t entries, int64_t dim, const std::string& isa) { return packed_bytes(entries, dim, isa_named(isa)); },
        py::arg("entries"), py::arg("dim"), py::arg("isa"));
    m.def(
        "packed_entries",
        [](int64_t entries, const std::string& isa) {
            const int64_t panel = panel_words(isa_named(isa));
            return (entries + panel - 1) / panel * panel;
        },
        py::arg("entries"), py::arg("isa"));

    // Without `isa`, `packed` already holds a packed codebook, and is packed anew for the same instruction set.
    m.def(
        "pack_codebook",
        [](const TensorView& words, const TensorView& packed, int threads, const std::optional<std::string>& isa) {
            const Codebook book = words_view(words);
            const int64_t dim = words.shape[1];
            const PackedCodebook view = isa ? packed_bytes_of(packed, book.entries, dim, isa_named(*isa))
                                            : packed_codebook(packed, book.entries, dim);
            LC_CHECK(threads >= 1, "pack_codebook: threads must be at least 1");
            py::gil_scoped_release unlocked;
            pack_centre(book, view);
            pack_codebook(book, view, at_most_threads(threads));
        },
        py::arg("words"), py::arg("packed"), py::kw_only(), py::arg("threads"), py::arg("isa") = py::none());

    m.def(
        "rvq_gram",
        [](const TensorView& words, const TensorView& packed, const TensorView& gram, int threads) {
            const Codebook book = words_view(words);
            const PackedCodebook view = packed_codebook(packed, book.entries, words.shape[1]);
            auto* out = gram.whole<float>("rvq_gram: gram", DType::float32, {view.entries, view.padded});
            LC_CHECK(threads >= 1, "rvq_gram: threads must be at least 1");
            py::gil_scoped_release unlocked;
            rvq_gram(book, view, at_most_threads(threads), out);
        },
        py::arg("words"), py::arg("packed"), py::arg("gram"), py::kw_only(), py::arg("threads"));
}

}  // namespace longcat
