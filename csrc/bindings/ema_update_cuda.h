// Arguments of ema_update on a CUDA device from Python.
#pragma once

#include "bindings/ema_update.h"
#include "bindings/rvq_encode_cuda.h"
#include "cuda/ema_update_launch.h"

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
    void* place = packed ? half_codebook(*packed, {p.embed, p.entries, p.dim}, p.dim) : nullptr;
    run_with_workspace(kernels, stream, allocate, [&](cuda::Queue& queue, void* workspace) {
        return cuda::ema_update(queue, p, place, result, workspace);
    });
}

inline void bind_ema_update_cuda(pybind11::module_& m) { m.def("ema_update_cuda", &ema_update_cuda); }

}  // namespace longcat
