// Arguments of depth_decode from Python, of what packs its weights, and of its sampler alone.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "cpu/depth_sampler.h"
#include "longcat/depth_decode.h"

namespace longcat {

using Tensors = std::vector<TensorView>;

// A config as the op's schema has it: twelve numbers, then five for each level.
inline DepthShape depth_shape(const std::vector<int64_t>& config, double eps) {
    LC_CHECK(config.size() >= 12 && config[0] >= 1 && config[0] <= kMostLevels &&
                 int64_t(config.size()) == 12 + 5 * config[0],
             "depth_decode: config must be 12 numbers and 5 for each of 1 to 32 levels");
    DepthShape s{config[0],       config[1],       config[2],  config[3], config[4],
                 config[5],       config[6],       config[7],  config[8], Conditioning(config[9]),
                 config[10] != 0, config[11] != 0, float(eps), nullptr,   nullptr,
                 nullptr,         nullptr,         nullptr};
    const int64_t* per_level = config.data() + 12;
    s.classes = per_level, s.attention_sets = per_level + s.levels, s.ffn_sets = per_level + 2 * s.levels;
    s.projection_sets = per_level + 3 * s.levels, s.norm_sets = per_level + 4 * s.levels;
    for (size_t i = 12; i < config.size(); ++i)
        LC_CHECK(config[i] >= (i < size_t(12 + s.levels) ? 1 : 0), "depth_decode: config must have classes and sets");
    LC_CHECK(s.hidden >= 1 && s.dim >= 1 && s.layers >= 0 && s.kv_heads >= 1 && s.heads >= s.kv_heads &&
                 s.heads % s.kv_heads == 0 && s.head_dim >= 1 && s.ffn >= 1 && s.given >= 0 && s.given <= s.levels &&
                 config[9] >= 0 && config[9] <= 2,
             "depth_decode: config must have sizes of at least 1");
    return s;
}

// Takes the tensors of weights one after the other; empty ones are absent.
struct DepthTensors {
    const Tensors& tensors;
    DType dtype;
    size_t at = 0;

    const TensorView* next(const std::vector<int64_t>& shape, DType wanted) {
        LC_CHECK(at < tensors.size(), "depth_decode: weights must be all that the config has");
        const TensorView& t = tensors[at++];
        if (t.is_empty()) return nullptr;
        LC_CHECK(t.device == "cpu" && t.dtype == wanted && t.shape == shape,
                 "depth_decode: weights must be on the CPU, of hidden's dtype and the shapes that the config gives");
        return &t;
    }

    // Numbers [count] or [sets, count].
    Strided vector(const std::vector<int64_t>& shape) {
        const TensorView* t = next(shape, dtype);
        if (t == nullptr) return {};
        return {t->data, t->dtype, shape.size() == 2 ? t->strides[0] : 0, t->strides.back()};
    }

    // [rows, columns] or [sets, rows, columns] with adjacent columns.
    Strided matrix(const std::vector<int64_t>& shape) {
        const TensorView* t = next(shape, dtype);
        if (t == nullptr) return {};
        LC_CHECK(shape.back() == 1 || t->strides.back() == 1, "depth_decode: weights must have adjacent columns");
        return {t->data, t->dtype, shape.size() == 3 ? t->strides[0] : 0, t->strides[shape.size() - 2]};
    }
};

inline int64_t depth_sets(const DepthShape& s, const int64_t* sets) {
    return 1 + *std::max_element(sets, sets + s.levels);
}

inline DepthLayer depth_layer(DepthTensors& next, const DepthShape& s) {
    const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
    const int64_t a = depth_sets(s, s.attention_sets), f = depth_sets(s, s.ffn_sets);
    DepthLayer l;
    l.norm1 = next.vector({s.dim});
    l.q = next.matrix({a, queries, s.dim}), l.q_bias = next.vector({a, queries});
    l.k = next.matrix({a, keys, s.dim}), l.k_bias = next.vector({a, keys});
    l.v = next.matrix({a, keys, s.dim}), l.v_bias = next.vector({a, keys});
    l.out = next.matrix({a, s.dim, queries}), l.out_bias = next.vector({a, s.dim});
    l.q_norm = next.vector({s.head_dim}), l.k_norm = next.vector({s.head_dim}), l.norm2 = next.vector({s.dim});
    l.gate = next.matrix({f, s.ffn, s.dim}), l.up = next.matrix({f, s.ffn, s.dim});
    l.down = next.matrix({f, s.dim, s.ffn});
    const Strided* needed[] = {&l.norm1, &l.q, &l.k, &l.v, &l.out, &l.norm2, &l.up, &l.down};
    for (const Strided* t : needed) LC_CHECK(t->data != nullptr, "depth_decode: weights must have no matrix missing");
    LC_CHECK((l.gate.data != nullptr) == s.gated, "depth_decode: weights must have a gate if the config says so");
    return l;
}

// All but the tables, which stand before the heads.
inline DepthWeights depth_weights(const Tensors& tensors, const DepthShape& s, DType dtype) {
    LC_CHECK(is_float(dtype), "depth_decode: weights must be float32, bfloat16 or float16");
    LC_CHECK(int64_t(tensors.size()) == 5 + 15 * s.layers + 3 * s.levels,
             "depth_decode: weights must be all that the config has");
    DepthTensors next{tensors, dtype};
    const int64_t projections = depth_sets(s, s.projection_sets), norms = depth_sets(s, s.norm_sets);
    DepthWeights w;
    w.input_norm = next.vector({s.hidden}), w.projection = next.matrix({projections, s.dim, s.hidden});
    w.projection_bias = next.vector({projections, s.dim}), w.final_norm = next.vector({norms, s.dim});
    LC_CHECK(w.projection.data != nullptr || s.hidden == s.dim, "depth_decode: weights must have a projection");
    const TensorView* rope = next.next({2, s.levels, s.head_dim / 2}, DType::float32);
    if (rope != nullptr) {
        LC_CHECK(rope->is_contiguous() && s.head_dim % 2 == 0, "depth_decode: rope must be contiguous");
        w.rope = {rope->data, DType::float32, 0, 1};
    }
    for (int64_t i = 0; i < s.layers; ++i) w.layers.push_back(depth_layer(next, s));
    next.at += size_t(s.levels);
    for (int64_t l = 0; l < s.levels; ++l) w.heads.push_back(next.matrix({s.classes[l], s.dim}));
    for (int64_t l = 0; l < s.levels; ++l) w.head_biases.push_back(next.vector({s.classes[l]}));
    for (int64_t l = s.given; l < s.levels; ++l)
        LC_CHECK(w.heads[size_t(l)].data != nullptr, "depth_decode: weights must have a head at every level not given");
    return w;
}

inline void set_tables(DepthDecode& p, const Tensors& tables) {
    LC_CHECK(int64_t(tables.size()) == p.shape.levels, "depth_decode: tables must be one a level");
    for (size_t l = 0; l < tables.size(); ++l) {
        const TensorView& t = tables[l];
        p.tables.emplace_back();
        if (t.is_empty() && l + 1 == tables.size()) continue;
        t.matrix("depth_decode: tables", p.dtype);
        LC_CHECK(t.shape[0] >= p.shape.classes[l] && t.shape[1] == p.shape.table_width() &&
                     (t.shape[1] == 1 || t.strides[1] == 1),
                 "depth_decode: tables must have a row of adjacent numbers for each class");
        p.tables.back() = {t.data, t.dtype, 0, t.strides[0]};
    }
}

// Rows [rows, width] of adjacent numbers.
inline Strided depth_rows(const char* name, const TensorView& t, DType dtype, int64_t rows, int64_t width) {
    t.matrix(name, dtype);
    LC_CHECK(t.shape[0] == rows && t.shape[1] == width && (width == 1 || rows == 0 || t.strides[1] == 1),
             std::string(name) + " must have rows of adjacent numbers and the shape that the config gives");
    return {t.data, t.dtype, 0, t.strides[0]};
}

// What each row may have of its own.
struct DepthOptions {
    std::optional<TensorView> start, prefix, active, leaders, history, offsets;
};

inline void set_options(DepthDecode& p, const DepthOptions& o) {
    const int64_t rows = p.rows, levels = p.shape.levels;
    if (o.start) p.start = depth_rows("depth_decode: start", *o.start, p.dtype, rows, p.shape.dim);
    if (o.prefix) {
        o.prefix->matrix("depth_decode: prefix", DType::int64);
        p.forced = o.prefix->shape[1];
        p.prefix = o.prefix->whole<int64_t>("depth_decode: prefix", DType::int64, {rows, p.forced});
    }
    LC_CHECK(p.forced >= p.shape.given && p.forced <= levels,
             "depth_decode: prefix must cover the levels that are given");
    if (o.active) p.active = o.active->whole<bool>("depth_decode: active", DType::boolean, {rows});
    if (o.leaders) p.leaders = o.leaders->whole<int64_t>("depth_decode: leaders", DType::int64, {rows});
    if (!o.history || !o.offsets) return;
    o.history->matrix("depth_decode: history", DType::int64);
    p.history = o.history->whole<int64_t>("depth_decode: history", DType::int64, {o.history->shape[0], levels});
    p.offsets = o.offsets->whole<int64_t>("depth_decode: offsets", DType::int64, {rows + 1});
}

inline void set_numbers(DepthDecode& p, const TensorView& params, const TensorView& seeds, const TensorView& steps) {
    LC_CHECK(params.device == "cpu" && params.dtype == DType::float32 &&
                 params.shape == (std::vector<int64_t>{p.rows, p.shape.levels, kDrawParams}) && params.strides[2] == 1,
             "depth_decode: params must be float32 [rows, levels, 8] on the CPU");
    p.params = static_cast<const float*>(params.data);
    p.params_row = params.strides[0], p.params_level = params.strides[1];
    p.seeds = seeds.whole<int64_t>("depth_decode: seeds", DType::int64, {p.rows});
    p.steps = steps.whole<int64_t>("depth_decode: steps", DType::int64, {p.rows});
}

inline void set_outputs(DepthDecode& p, const TensorView& logprobs, const TensorView& drawn_logprobs,
                        const TensorView& embedding, const TensorView& logits, const TensorView& codes) {
    const int64_t levels = p.shape.levels;
    int64_t classes = 0;
    for (int64_t l = p.shape.given; l < levels; ++l) classes += p.shape.classes[l];
    p.logprobs = logprobs.whole<float>("depth_decode: logprobs", DType::float32, {p.rows, levels});
    p.drawn_logprobs = drawn_logprobs.whole<float>("depth_decode: drawn_logprobs", DType::float32, {p.rows, levels});
    p.embedding = embedding.whole("depth_decode: embedding", p.dtype, {p.rows, p.shape.table_width()});
    p.codes = codes.whole<int64_t>("depth_decode: codes", DType::int64, {p.rows, levels});
    if (!logits.is_empty()) p.logits = logits.whole<float>("depth_decode: logits", DType::float32, {p.rows, classes});
}

inline WeightFormat weight_format(DType dtype, const std::string& precision) {
    LC_CHECK(precision.empty() || precision == "int8", "pack_depth: precision must be none or int8");
    if (precision == "int8") return WeightFormat::int8;
    return dtype == DType::bfloat16 ? WeightFormat::bfloat16 : WeightFormat::float32;
}

inline void bind_depth_packing(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "packed_depth_bytes",
        [](const Tensors& weights, const std::vector<int64_t>& config, DType dtype, const std::string& precision,
           const std::string& isa) {
            const DepthShape shape = depth_shape(config, 0);
            const DepthWeights w = depth_weights(weights, shape, dtype);
            return packed_depth_bytes({shape, &w, weight_format(dtype, precision), isa_named(isa), 1, nullptr});
        },
        py::arg("weights"), py::arg("config"), py::arg("dtype"), py::kw_only(), py::arg("precision") = "",
        py::arg("isa") = "auto");
    m.def(
        "pack_depth",
        [](const Tensors& weights, const TensorView& packed, const std::vector<int64_t>& config, DType dtype,
           int threads, const std::string& precision, const std::string& isa) {
            const DepthShape shape = depth_shape(config, 0);
            const DepthWeights w = depth_weights(weights, shape, dtype);
            LC_CHECK(threads >= 1, "pack_depth: threads must be at least 1");
            PackDepth p{shape, &w, weight_format(dtype, precision), isa_named(isa), at_most_threads(threads), nullptr};
            p.packed = packed.whole("pack_depth: packed", DType::uint8, {packed_depth_bytes(p)});
            py::gil_scoped_release unlocked;
            pack_depth(p);
        },
        py::arg("weights"), py::arg("packed"), py::arg("config"), py::arg("dtype"), py::kw_only(), py::arg("threads"),
        py::arg("precision") = "", py::arg("isa") = "auto");
}

// The sampler alone, one thread: rows [rows, classes] of logits.
inline void bind_draw_codes(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "draw_codes",
        [](const TensorView& logits, const TensorView& params, const TensorView& seeds, const TensorView& steps,
           int64_t level, const TensorView& logprobs, const TensorView& drawn_logprobs, const TensorView& codes,
           const std::string& isa) {
            logits.matrix("draw_codes: logits", DType::float32);
            const int64_t rows = logits.shape[0], classes = logits.shape[1];
            LC_CHECK(classes >= 1, "draw_codes: logits must have a class");
            const auto* x = logits.whole<const float>("draw_codes: logits", DType::float32, {rows, classes});
            const auto* numbers = params.whole<const float>("draw_codes: params", DType::float32, {rows, kDrawParams});
            const auto* seed = seeds.whole<const int64_t>("draw_codes: seeds", DType::int64, {rows});
            const auto* step = steps.whole<const int64_t>("draw_codes: steps", DType::int64, {rows});
            auto* before = logprobs.whole<float>("draw_codes: logprobs", DType::float32, {rows});
            auto* after = drawn_logprobs.whole<float>("draw_codes: drawn_logprobs", DType::float32, {rows});
            auto* out = codes.whole<int64_t>("draw_codes: codes", DType::int64, {rows});
            const DrawCode draw = draw_code(isa_named(isa));
            py::gil_scoped_release unlocked;
            std::vector<float> room(size_t(draw_room(classes))), row(size_t(classes) + 64);
            for (int64_t i = 0; i < rows; ++i) {
                std::copy_n(x + i * classes, classes, row.begin());
                Draw d{};
                d.logits = row.data(), d.classes = classes, d.level = level, d.params = numbers + i * kDrawParams;
                d.seed = seed[i], d.step = step[i], d.forced = -1;
                const Drawn drawn = draw(d, room.data());
                out[i] = drawn.code, before[i] = drawn.logprob, after[i] = drawn.drawn_logprob;
            }
        },
        py::arg("logits"), py::arg("params"), py::arg("seeds"), py::arg("steps"), py::arg("level"), py::arg("logprobs"),
        py::arg("drawn_logprobs"), py::arg("codes"), py::kw_only(), py::arg("isa") = "auto");
}

inline void bind_depth_decode(pybind11::module_& m) {
    namespace py = pybind11;
    bind_depth_packing(m);
    bind_draw_codes(m);
    m.def(
        "depth_decode",
        [](const TensorView& hidden, const Tensors& weights, const Tensors& tables,
           const std::optional<TensorView>& packed, const TensorView& params, const TensorView& seeds,
           const TensorView& steps, const std::optional<TensorView>& start, const std::optional<TensorView>& prefix,
           const std::optional<TensorView>& active, const std::optional<TensorView>& leaders,
           const std::optional<TensorView>& history, const std::optional<TensorView>& offsets,
           const std::vector<int64_t>& config, double eps, const TensorView& logprobs, const TensorView& drawn_logprobs,
           const TensorView& embedding, const TensorView& logits, const TensorView& codes, const py::function& allocate,
           int threads, const std::string& isa) {
            DepthDecode p{};
            p.shape = depth_shape(config, eps), p.dtype = hidden.dtype, p.isa = isa_named(isa);
            LC_CHECK(is_float(p.dtype), "depth_decode: hidden must be float32, bfloat16 or float16");
            LC_CHECK(hidden.shape.size() == 2 && threads >= 1, "depth_decode: hidden must be [rows, H]");
            p.rows = hidden.shape[0], p.threads = at_most_threads(threads);
            p.hidden = depth_rows("depth_decode: hidden", hidden, p.dtype, p.rows, p.shape.hidden);
            DepthWeights w;
            if (packed) {
                p.packed = packed->whole("depth_decode: packed", DType::uint8, {packed->shape.at(0)});
                p.format = check_packed_depth(p.shape, p.packed, packed->shape[0], p.isa);
            } else {
                w = depth_weights(weights, p.shape, p.dtype);
                p.weights = &w;
            }
            set_tables(p, tables);
            set_numbers(p, params, seeds, steps);
            set_options(p, {start, prefix, active, leaders, history, offsets});
            set_outputs(p, logprobs, drawn_logprobs, embedding, logits, codes);
            const int64_t bytes = depth_scratch_bytes(p);
            const py::object scratch = allocate(bytes);
            p.scratch = scratch.cast<TensorView>().whole("depth_decode: scratch", DType::uint8, {bytes});
            py::gil_scoped_release unlocked;
            depth_decode(p);
        },
        py::arg("hidden"), py::arg("weights"), py::arg("tables"), py::arg("packed"), py::arg("params"),
        py::arg("seeds"), py::arg("steps"), py::arg("start"), py::arg("prefix"), py::arg("active"), py::arg("leaders"),
        py::arg("history"), py::arg("offsets"), py::arg("config"), py::arg("eps"), py::arg("logprobs"),
        py::arg("drawn_logprobs"), py::arg("embedding"), py::arg("logits"), py::arg("codes"), py::arg("allocate"),
        py::kw_only(), py::arg("threads"), py::arg("isa") = "auto");
}

}  // namespace longcat
