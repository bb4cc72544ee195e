// Arguments of ema_update on a CUDA device from Python.
#pragma once

#include "bindings/cuda.h"
#include "bindings/ema_update.h"
#include "cuda/ema_update_launch.h"
#include "cuda/half_layout.h"

namespace longcat {

inline void ema_update_cuda(CudaModule& kernels, uintptr_t stream, const CudaAllocate& allocate,
                            const CudaTensorView& embed, const CudaTensorView& embed_ema,
                            const CudaTensorView& cluster_size_ema, const std::optional<CudaTensorView>& packed,
                            const CudaTensorView& vectors, const CudaTensorView& codes, double decay, double eps,
                            double restart_threshold, double restart_fraction, double restart_count, int64_t seed,
                            const CudaTensorView& restarted) {
    check_device("ema_update", kernels, embed);
    const EmaUpdate p = ema_update_params(embed, embed_ema, cluster_size_ema, vectors, codes,
                                          {decay, eps, restart_threshold, restart_fraction, restart_count, seed});
    auto* result = restarted.whole<int64_t>("ema_update: restarted", DType::int64, {});
    if (packed) {
        int64_t bytes = 0;
        cuda::codebook_at(nullptr, 0, p.entries, p.dim, nullptr, &bytes);
        LC_CHECK(packed->device == "cuda" && packed->shape.size() == 1 && packed->shape[0] >= bytes,
                 "ema_update: packed must be the packed form of embed");
    }
    void* place = packed ? packed->data : nullptr;
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::ema_update(queue, p, 1, place, result, workspace);
    });
}

inline void bind_ema_update_cuda(pybind11::module_& m) { m.def("ema_update_cuda", &ema_update_cuda); }

}  // namespace longcat
