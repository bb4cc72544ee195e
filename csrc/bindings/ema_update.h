// Arguments of ema_update from Python.
#pragma once

#include <optional>

#include "bindings/rvq_encode.h"
#include "longcat/ema_update.h"

namespace longcat {

struct EmaRule {
    double decay, eps, restart_threshold, restart_fraction, restart_count;
    int64_t seed;
};

// The arguments that every device's implementation has, checked: a kernel trusts them.
template <class View>
EmaUpdate ema_update_params(const View& embed, const View& embed_ema, const View& cluster_size_ema, const View& vectors,
                            const View& codes, const EmaRule& rule) {
    EmaUpdate p{};
    p.vectors = vectors.matrix("ema_update: vectors", vectors.dtype), p.dtype = vectors.dtype;
    p.rows = vectors.shape[0], p.dim = vectors.shape[1], p.row_stride = vectors.strides[0];
    LC_CHECK(p.dim <= 1 || p.rows == 0 || vectors.strides[1] == 1, "ema_update: vectors must have adjacent elements");
    LC_CHECK(is_float(p.dtype), "ema_update: vectors must be float32, bfloat16 or float16");
    embed.matrix("ema_update: embed", DType::float32);
    p.entries = embed.shape[0];
    p.embed = embed.template whole<float>("ema_update: embed", DType::float32, {p.entries, p.dim});
    p.embed_ema = embed_ema.template whole<float>("ema_update: embed_ema", DType::float32, {p.entries, p.dim});
    p.cluster_size_ema =
        cluster_size_ema.template whole<float>("ema_update: cluster_size_ema", DType::float32, {p.entries});
    p.codes = codes.template whole<int64_t>("ema_update: codes", DType::int64, {p.rows});
    p.decay = rule.decay, p.eps = rule.eps, p.restart_threshold = rule.restart_threshold, p.seed = rule.seed;
    p.restart_fraction = rule.restart_fraction, p.restart_count = rule.restart_count;
    return p;
}

inline void bind_ema_update(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "ema_update",
        [](const TensorView& embed, const TensorView& embed_ema, const TensorView& cluster_size_ema,
           const std::optional<TensorView>& packed, const TensorView& vectors, const TensorView& codes, double decay,
           double eps, double restart_threshold, double restart_fraction, double restart_count, int64_t seed,
           const TensorView& restarted, int threads, const std::string& isa) {
            EmaUpdate p = ema_update_params(embed, embed_ema, cluster_size_ema, vectors, codes,
                                            {decay, eps, restart_threshold, restart_fraction, restart_count, seed});
            LC_CHECK(threads >= 1, "ema_update: threads must be at least 1");
            p.threads = at_most_threads(threads);
            p.isa = isa_named(isa);
            if (packed) p.packed = packed_codebook(*packed, p.entries, p.dim);
            auto* result = restarted.whole<int64_t>("ema_update: restarted", DType::int64, {});
            py::gil_scoped_release unlocked;
            *result = ema_update(p);
        },
        py::arg("embed"), py::arg("embed_ema"), py::arg("cluster_size_ema"), py::arg("packed"), py::arg("vectors"),
        py::arg("codes"), py::arg("decay"), py::arg("eps"), py::arg("restart_threshold"), py::arg("restart_fraction"),
        py::arg("restart_count"), py::arg("seed"), py::arg("restarted"), py::kw_only(), py::arg("threads"),
        py::arg("isa") = "auto");
}

}  // namespace longcat
