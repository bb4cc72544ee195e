// rvq_decode on a device.
#pragma once

#include "cuda/queue.h"
#include "longcat/rvq_decode.h"

namespace longcat::cuda {

void rvq_decode(Queue& queue, const longcat::RvqDecode& p);

// Gives the bytes that the workspace must have; with a null workspace that is all it does.
int64_t rvq_decode_backward(Queue& queue, const longcat::RvqDecodeBackward& p, void* workspace);

}  // namespace longcat::cuda
