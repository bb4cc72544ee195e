// depth_decode on a device.
#pragma once

#include <vector>

#include "cuda/depth_params.cuh"
#include "cuda/queue.h"

namespace longcat::cuda {

// One of the op's weights; null where absent. Strides in elements, of the axes that it has.
struct DepthTensor {
    const void* data;
    int64_t strides[3];
};

// A kernel's sizes and weights, from the numbers and the tensors of the op's schema in their order there.
DepthKernel depth_kernel(const std::vector<int64_t>& config, float eps, const std::vector<DepthTensor>& weights);

// How many rows one launch takes on a device: 256 in bfloat16, where the sums of tensor cores leave room for the rings
// of weights in shared memory; else those whose activations, float32 and as deep as the deepest product, leave it. 0
// where the sizes are not the kernels'.
int64_t depth_most_rows(const Device& device, const std::vector<int64_t>& config, int type);

// `p` has all but its memory. Gives the bytes that the workspace must have; with a null workspace that is all it does.
int64_t depth_decode(Queue& queue, DepthKernel p, void* workspace);

}  // namespace longcat::cuda
