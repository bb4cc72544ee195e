// rvq_encode on a device: grids, shared memory, workspace.
#pragma once

#include <vector>

#include "cuda/queue.h"
#include "longcat/rvq_encode.h"
#include "longcat/rvq_encode_backward.h"

namespace longcat::cuda {

// Which screen a device runs, and how its grid covers a level.
struct ScreenPlan {
    int lists;  // of candidates that a part writes
    Launch launch;
    Schedule schedule;
};

ScreenPlan plan_screen(const Device& device, int64_t rows, int entries);

// `packed`: each level's packed codebook, or empty; what is missing is packed in the workspace. Gives the bytes that
// the workspace must have; with a null workspace that is all it does.
int64_t rvq_encode(Queue& queue, const longcat::RvqEncode& p, const std::vector<void*>& packed, void* workspace);

// Fills one packed codebook; as above.
int64_t rvq_pack(Queue& queue, const float* words, int64_t stride, int64_t entries, int64_t dim, void* packed,
                 void* workspace);

void rvq_encode_backward(Queue& queue, const longcat::RvqEncodeBackward& p);

}  // namespace longcat::cuda
