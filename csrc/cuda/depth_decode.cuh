// All codes of a position in one launch: reference/depth_decode.py defines it. For few rows, by multiply-adds in
// float32; for many, depth_mma.cuh.
//
// One block of 384 threads stays on each multiprocessor for the whole frame. Stages are divided over all blocks and
// meet at barriers of the grid: of every level the projection; of every layer queries, keys and values, attention, the
// output product, the two products of the feed-forward network; then the head and the draw, a block a row. At the front
// of a stage each block makes the stage's activations, float32, in its shared memory, with norm and activation function
// applied; the weights it multiplies them with are there already or on their way (depth_stream.cuh), so that the memory
// bus does not wait for barriers.
//
// Occupancy. 384 threads with at most 168 registers each fill the register file (64,512 of 65,536); NVRTC 13 takes 152,
// 156 and 143 of them for sm_80, sm_90a and sm_100a, and no stack. So one block is resident on a multiprocessor, and as
// many are launched, cooperatively, as there are multiprocessors. Of the 227 KB of shared memory that a block may have
// (compute capability 9.0 and 10.0; 163 KB on 8.0), 3 KB are the header, 4 * rows * depth bytes the activations, the
// rest rings of 24 KB a slot, six at most. One row of depth 4096 leaves six slots: 144 KB that are on their way or
// wait. An H200 at 4.3 TB/s brings each of its 132 multiprocessors 33 bytes a nanosecond, so this covers 4.4 us of a
// barrier and the making of activations; eight rows of depth 4096 leave four slots (2.9 us), eight of 6144 one, which
// is too few: float32 weights then take four rows, bfloat16 those of depth_mma.cuh.
#pragma once

#include "cuda/depth_mma.cuh"
#include "cuda/depth_stages.cuh"

namespace longcat::cuda {

// What a block holds during the frame.
struct DepthBlock {
    DepthShared& shared;
    float* activations;  // [padded rows, columns]
    DepthRing ring;
    TileCursor ahead;
    GridBarrier grid;

    LC_DEVICE DepthBlock(const DepthKernel& p, u8* memory)
        : shared(*reinterpret_cast<DepthShared*>(memory)),
          activations(reinterpret_cast<float*>(memory + kDepthHeader)) {
        ring.start(p, memory + kDepthHeader + padded_rows(p.rows) * p.columns * int(sizeof(float)), ahead);
    }
};

// Activations of all rows in shared memory, normed; zeros behind their depth and in rows that fill up.
LC_DEVICE void make_activations(const DepthKernel& p, DepthBlock& b, int level, int index) {
    const Product product = product_of(p, index);
    const int rows = padded_rows(p.rows), depth = depth_of(p, product), end = (depth + kStep - 1) / kStep * kStep;
    LC_LOOP for (int r = 0; r < rows; ++r) {
        float squares = 0;
        LC_LOOP for (int k = int(thread_index()); k < end; k += int(kDepthThreads)) {
            const float x = r < p.rows && k < depth ? activation(p, level, product, r, k) : 0;
            b.activations[r * p.columns + k] = x;
            squares = fmaf(x, x, squares);
        }
        squares = warp_sum(squares);
        if (lane_index() == 0) b.shared.floats[r][thread_index() / kWarp] = squares;
    }
    sync_block();
    i64 first = 0;
    const void* weight = norm_before(p, level, index, first);
    if (weight == nullptr) return;
    LC_LOOP for (int r = 0; r < p.rows; ++r) {
        float squares = 0;
        for (u32 warp = 0; warp < kDepthWarps; ++warp) squares += b.shared.floats[r][warp];
        const float scale = 1 / sqrtf(squares / float(depth) + p.eps);
        LC_LOOP for (int k = int(thread_index()); k < depth; k += int(kDepthThreads))
            b.activations[r * p.columns + k] *= scale * load(weight, p.type, first + k);
    }
    sync_block();
}

// This block's part of a product of the activations with weights.
LC_DEVICE void multiply(const DepthKernel& p, DepthBlock& b, int level, int index) {
    const int rows = padded_rows(p.rows), lane = int(lane_index());
    DepthTile tile;
    LC_LOOP for (int number = first_tile(); find_tile(p, level, index, number, tile); number += tile_stride()) {
        const float sum = multiply_tile(p, b.activations, b.ring, b.ahead, tile.rows.depth);
        const int n = tile.row + lane / rows, r = lane % rows;
        if (lane < rows * tile_rows(p.rows) && n < tile.rows.rows && r < p.rows)
            finish_product(p, level, index, tile.part, n, r, sum);
    }
}

// In place of a projection that is the identity.
LC_DEVICE void keep_activations(const DepthKernel& p, DepthBlock& b, int level) {
    for (int i = int(block_index() * kDepthThreads + thread_index()); i < p.rows * p.dim;
         i += int(grid_size() * kDepthThreads))
        p.memory.z[i] = b.activations[i / p.dim * p.columns + i % p.dim] + added_input(p, level, i / p.dim, i % p.dim);
}

// All products of a level, and attention between them.
LC_DEVICE void run_level(const DepthKernel& p, DepthBlock& b, int level) {
    const int products = products_of(p) - (level < p.given ? 1 : 0);
    LC_LOOP for (int index = 0; index < products; ++index) {
        make_activations(p, b, level, index);
        multiply(p, b, level, index);
        if (index == 0 && p.projection.data == nullptr) keep_activations(p, b, level);
        b.grid.meet(p);
        if (product_of(p, index) != kQkv) continue;
        attend(p, level, (index - 1) / 4);
        b.grid.meet(p);
    }
}

}  // namespace longcat::cuda

LC_KERNEL(longcat::cuda::kDepthThreads) depth_decode(LC_PARAMS(longcat::cuda::DepthKernel) p) {
    using namespace longcat::cuda;
    DepthBlock b(p, dynamic_shared());
    LC_LOOP for (int level = 0; level < p.levels; ++level) {
        run_level(p, b, level);
        draw_level(p, b.shared, level);
        if (level + 1 < p.levels) b.grid.meet(p);
    }
}
