// The plain kernels, for the emulation.
#pragma once

#include "cuda/depth_decode.cuh"
#include "cuda/ema_update.cuh"
#include "cuda/rvq_decode.cuh"
#include "cuda/rvq_encode.cuh"
#include "emulation.h"

namespace longcat::cuda {

#define LC_KERNEL_OF(name, Params) {#name, [](const void* p) { name(*static_cast<const Params*>(p)); }}
// By name, as a module has them.
inline const std::map<std::string, Kernel>& emulated_kernels() {
    static const std::map<std::string, Kernel> kernels = {
        LC_KERNEL_OF(rvq_pack_norm, RvqPack),    LC_KERNEL_OF(rvq_pack_sum, RvqPack),
        LC_KERNEL_OF(rvq_pack_centre, RvqPack),  LC_KERNEL_OF(rvq_pack_words, RvqPack),
        LC_KERNEL_OF(rvq_prepare, RvqPrepare),   LC_KERNEL_OF(rvq_coarse_plain, RvqCoarse),
        LC_KERNEL_OF(rvq_finish, RvqFinish),     LC_KERNEL_OF(rvq_losses, RvqLosses),
        LC_KERNEL_OF(rvq_gather, RvqGather),     LC_KERNEL_OF(rvq_backward, RvqBackward),
        LC_KERNEL_OF(sort_count, SortPass),      LC_KERNEL_OF(sort_scan, SortPass),
        LC_KERNEL_OF(sort_scatter, SortPass),    LC_KERNEL_OF(segment_sum, SegmentSum),
        LC_KERNEL_OF(ema_counts, EmaKernel),     LC_KERNEL_OF(ema_totals, EmaKernel),
        LC_KERNEL_OF(ema_entries, EmaKernel),    LC_KERNEL_OF(ema_restarted, EmaKernel),
        LC_KERNEL_OF(depth_decode, DepthKernel), LC_KERNEL_OF(depth_decode_mma, DepthKernel),
    };
    return kernels;
}

}  // namespace longcat::cuda
