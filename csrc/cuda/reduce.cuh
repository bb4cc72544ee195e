// Sums in orders that do not depend on timing.
#pragma once

#include "cuda/device.cuh"

namespace longcat::cuda {

template <class T>
LC_DEVICE T warp_sum(T value) {
    for (u32 mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

LC_DEVICE float warp_max(float value) {
    for (u32 mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// The sum over a block of kThreads threads, in every thread. `slots` is shared, one element a warp, and free again for
// the next call.
template <u32 kThreads, class T>
LC_DEVICE T block_sum(T value, T* slots) {
    value = warp_sum(value);
    if (lane_index() == 0) slots[thread_index() / kWarp] = value;
    sync_block();
    T total = slots[0];
    for (u32 warp = 1; warp < kThreads / kWarp; ++warp) total += slots[warp];
    sync_block();
    return total;
}

template <u32 kThreads>
LC_DEVICE float block_max(float value, float* slots) {
    value = warp_max(value);
    if (lane_index() == 0) slots[thread_index() / kWarp] = value;
    sync_block();
    float largest = slots[0];
    for (u32 warp = 1; warp < kThreads / kWarp; ++warp) largest = fmaxf(largest, slots[warp]);
    sync_block();
    return largest;
}

// Sum of a_d b_d over one warp, in every lane, to the last bit as reference/rvq_encode.py defines it: products, exact
// in double, zero-padded to a power of two (here at least 256, as zeros change nothing); the second half is added to
// the first until one is left.
//
// Lane i holds the terms d = i + 32 j. Halving keeps terms of one residue modulo 32 together until 32 are left, which
// the shuffles fold. Within a lane the tree T(n terms, first, stride) = T(n/2, first, 2 stride) + T(n/2, first +
// stride, 2 stride), ending at stride n, is walked depth first: leaves of eight terms come in bit-reversed order, and
// partial sums wait on a stack, one place a depth, as the digits of a binary counter.
LC_DEVICE double tree_dot(const float* a, const float* b, int dim) {
    constexpr int kDepth = 8, kLeaf = 8;  // rows of up to 32 * 8 * 2^8 = 65536 terms
    int leaves = 1, depth = 0;
    while (leaves * kLeaf * int(kWarp) < dim) leaves *= 2, ++depth;
    double stack[kDepth + 1];
    LC_UNROLL for (int level = 0; level <= kDepth; ++level) stack[level] = 0;
    double total = 0;
    for (int leaf = 0; leaf < leaves; ++leaf) {
        int first = 0;
        for (int bit = 0; bit < depth; ++bit) first |= (leaf >> bit & 1) << (depth - 1 - bit);
        double term[kLeaf];
        LC_UNROLL for (int i = 0; i < kLeaf; ++i) {
            const int d = int(lane_index()) + int(kWarp) * (first + leaves * i);
            term[i] = d < dim ? double(a[d]) * double(b[d]) : 0.0;
        }
        total = ((term[0] + term[4]) + (term[2] + term[6])) + ((term[1] + term[5]) + (term[3] + term[7]));
        bool carried = true;
        LC_UNROLL for (int level = 0; level < kDepth; ++level) {
            const bool waits = leaf >> level & 1;
            if (carried && waits) total = stack[level] + total;
            if (carried && !waits) stack[level] = total, carried = false;
        }
    }
    return warp_sum(total);
}

}  // namespace longcat::cuda
