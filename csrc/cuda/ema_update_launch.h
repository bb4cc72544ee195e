// ema_update on a device.
#pragma once

#include "cuda/queue.h"
#include "longcat/ema_update.h"

namespace longcat::cuda {

// `packed`: the codebook's packed form, refreshed, or null. `restarted` is on the device. Gives the bytes that the
// workspace must have; with a null workspace that is all it does.
int64_t ema_update(Queue& queue, const longcat::EmaUpdate& p, void* packed, int64_t* restarted, void* workspace);

}  // namespace longcat::cuda
