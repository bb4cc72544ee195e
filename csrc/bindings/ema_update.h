// Arguments of ema_update from Python.
#pragma once

#include "bindings/tensor_view.h"
#include "longcat/ema_update.h"

namespace longcat {

inline void bind_ema_update(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "ema_update",
        [](const TensorView& embed, const TensorView& embed_ema, const TensorView& cluster_size_ema,
           const TensorView& vectors, const TensorView& codes, double decay, double eps, double restart_threshold,
           int64_t seed, const TensorView& restarted, int threads) {
            EmaUpdate p{};
            for (const TensorView* view : {&embed, &embed_ema, &cluster_size_ema, &codes})
                LC_CHECK(view->is_contiguous(), "ema_update: codebook, statistics and codes must be contiguous");
            LC_CHECK(threads >= 1, "ema_update: threads must be at least 1");
            p.rows = vectors.shape.at(0), p.dim = embed.shape.at(1), p.entries = embed.shape.at(0);
            LC_CHECK(p.dim <= 1 || p.rows == 0 || vectors.strides.at(1) == 1,
                     "ema_update: vectors must have adjacent elements");
            p.vectors = vectors.data, p.dtype = vectors.dtype, p.row_stride = vectors.strides.at(0);
            p.codes = codes.as<int64_t>(DType::int64);
            p.decay = decay, p.eps = eps, p.restart_threshold = restart_threshold, p.seed = seed, p.threads = threads;
            p.embed = embed.as<float>(DType::float32), p.embed_ema = embed_ema.as<float>(DType::float32);
            p.cluster_size_ema = cluster_size_ema.as<float>(DType::float32);
            int64_t* result = restarted.as<int64_t>(DType::int64);
            py::gil_scoped_release unlocked;
            *result = ema_update(p);
        },
        py::arg("embed"), py::arg("embed_ema"), py::arg("cluster_size_ema"), py::arg("vectors"), py::arg("codes"),
        py::arg("decay"), py::arg("eps"), py::arg("restart_threshold"), py::arg("seed"), py::arg("restarted"),
        py::kw_only(), py::arg("threads"));
}

}  // namespace longcat
