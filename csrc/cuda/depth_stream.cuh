// The weights of depth_decode on their way through shared memory.
//
// Every product's rows of weights are divided into tiles of 1, 2 or 4 rows, and those over all warps of the grid. What
// a warp will read of the whole frame is thereby known at the start: a cursor walks over it and keeps the warp's own
// ring of slots full by asynchronous copies, across stages and grid barriers, as weights depend on no code. A second
// walk multiplies what has come. No other warp ever touches a ring, so that its users need no barrier of the block.
#pragma once

#include "cuda/depth_params.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tiles.cuh"

namespace longcat::cuda {

// Products of a level: the projection, four of each layer, the head.
enum Product : int { kProject, kQkv, kOut, kUp, kDown, kHead };

LC_BOTH int products_of(const DepthKernel& p) { return 2 + 4 * p.layers; }

LC_BOTH Product product_of(const DepthKernel& p, int index) {
    if (index == 0) return kProject;
    return index == products_of(p) - 1 ? kHead : Product(kQkv + (index - 1) % 4);
}

// Rows of weights that lie one after the other: a product has up to three such parts.
struct WeightRows {
    const u8* data;
    i64 stride;  // bytes
    int rows, depth;
};

LC_BOTH WeightRows rows_of(const DepthKernel& p, const DepthMatrix& m, int set, int rows, int depth) {
    const int size = p.type == kFloat32 ? 4 : 2;
    return {static_cast<const u8*>(m.data) + set * m.set * size, m.row * size, m.data == nullptr ? 0 : rows, depth};
}

LC_BOTH WeightRows part_of(const DepthKernel& p, int level, int index, int part) {
    const DepthLevel& at = p.level[level];
    const DepthLayer& layer = p.layer[(index - 1) / 4 < p.layers ? (index - 1) / 4 : 0];
    const int attention = at.attention_set, ffn = at.ffn_set;
    switch (product_of(p, index)) {
        case kProject:
            return rows_of(p, p.projection, at.projection_set, part == 0 ? p.dim : 0, p.hidden);
        case kQkv:
            if (part == 0) return rows_of(p, layer.q, attention, p.query_width(), p.dim);
            return rows_of(p, part == 1 ? layer.k : layer.v, attention, p.key_width(), p.dim);
        case kOut:
            return rows_of(p, layer.out, attention, part == 0 ? p.dim : 0, p.query_width());
        case kUp:
            return rows_of(p, part == 0 ? layer.up : layer.gate, ffn, part < 2 ? p.ffn : 0, p.dim);
        case kDown:
            return rows_of(p, layer.down, ffn, part == 0 ? p.dim : 0, p.ffn);
        default:
            return rows_of(p, {at.head, 0, at.head_row}, 0, part == 0 ? at.classes : 0, p.dim);
    }
}

// A tile of a product: `part`'s rows from `row` on.
struct DepthTile {
    WeightRows rows;
    int part, row;
};

// The `number`th tile of a product; false where it has fewer.
LC_BOTH bool find_tile(const DepthKernel& p, int level, int index, int number, DepthTile& tile) {
    const int size = tile_rows(p.rows);
    LC_LOOP for (int part = 0; part < 3; ++part) {
        const WeightRows rows = part_of(p, level, index, part);
        const int tiles = (rows.rows + size - 1) / size;
        if (number < tiles) return tile = {rows, part, number * size}, true;
        number -= tiles;
    }
    return false;
}

// A warp's tiles are every `stride`th from `first` on: neighbours go to different blocks.
LC_DEVICE int first_tile() { return int(thread_index() / kWarp * grid_size() + block_index()); }
LC_DEVICE int tile_stride() { return int(kDepthWarps * grid_size()); }

// Elements of each row of a tile in a slot.
LC_BOTH int chunk_of(const DepthKernel& p) { return kSlotBytes / tile_rows(p.rows) / (p.type == kFloat32 ? 4 : 2); }

// A slot's elements: `rows` rows of `of` from `row` on, of each those from `depth` on.
struct DepthChunk {
    const WeightRows& of;
    int row, rows, depth;
    bool swizzled;  // of rows of 128 bytes
};

// Rows that do not lie in pieces of sixteen bytes.
LC_DEVICE void copy_elements(int type, u8* to, const u8* row, int first, int depth) {
    const int count = type == kFloat32 ? 4 : 8;
    LC_LOOP for (int i = 0; i < count; ++i) {
        const bool exists = first + i < depth;
        if (type == kFloat32)
            reinterpret_cast<float*>(to)[i] = exists ? reinterpret_cast<const float*>(row)[first + i] : 0;
        else
            reinterpret_cast<u16*>(to)[i] = exists ? reinterpret_cast<const u16*>(row)[first + i] : u16(0);
    }
}

// Starts a warp's copy to a slot: zeros behind the rows' depth, the last row again in place of rows that are not there.
LC_DEVICE void copy_chunk(int type, u8* slot, const DepthChunk& chunk) {
    const WeightRows& rows = chunk.of;
    const int size = type == kFloat32 ? 4 : 2, pieces = kSlotBytes / 16 / chunk.rows;
    const bool whole = ((u64(rows.data) | u64(rows.stride) | u64(rows.depth * size)) & 15) == 0;
    LC_LOOP for (int i = 0; i < kSlotBytes / 16 / int(kWarp); ++i) {
        const int piece = i * int(kWarp) + int(lane_index()), first = chunk.depth + piece % pieces * (16 / size);
        const int row = chunk.row + piece / pieces;
        const u8* source = rows.data + (row < rows.rows ? row : rows.rows - 1) * rows.stride;
        u8* to = slot + (chunk.swizzled ? int(swizzled(u32(piece / 8), u32(piece % 8))) : piece * 16);
        if (whole) {
            const bool exists = first < rows.depth;
            start_copy(to, source + (exists ? first * size : 0), exists);
        } else {
            copy_elements(type, to, source, first, rows.depth);
        }
    }
}

// Walks over all that a warp reads of a frame, a slot at a time.
struct TileCursor {
    DepthTile tile;
    int level, index, number, depth;  // the last: elements of the tile's depth that lie behind

    LC_DEVICE void start(const DepthKernel& p) { level = 0, index = 0, number = first_tile(), settle(p); }

    LC_DEVICE bool at_end(const DepthKernel& p) const { return level == p.levels; }

    LC_DEVICE DepthChunk chunk(const DepthKernel& p) const {
        return {tile.rows, tile.row, tile_rows(p.rows), depth, false};
    }

    // To the next product that has a tile for this warp, from the one it stands at.
    LC_DEVICE void settle(const DepthKernel& p) {
        depth = 0;
        while (level < p.levels && !find_tile(p, level, index, number, tile)) {
            number = first_tile();
            if (++index == products_of(p)) index = 0, ++level;
        }
    }

    LC_DEVICE void advance(const DepthKernel& p) {
        depth += chunk_of(p);
        if (depth >= tile.rows.depth) number += tile_stride(), settle(p);
    }
};

// A warp's slots, of which the oldest is the next to be multiplied. `ahead` is a cursor at what will be copied next.
struct DepthRing {
    u8* slots;
    int count, oldest;

    template <class Cursor>
    LC_DEVICE void start(const DepthKernel& p, u8* rings, Cursor& ahead) {
        slots = rings + thread_index() / kWarp * u32(p.slots * kSlotBytes), count = p.slots, oldest = 0;
        ahead.start(p);
        LC_LOOP for (int slot = 0; slot < count; ++slot) refill(p, ahead);
    }

    // Until the `needed` oldest slots have come.
    LC_DEVICE void wait(int needed) const {
        const int left = count - needed;
        if (left == 0) wait_groups<0>();
        if (left == 1) wait_groups<1>();
        if (left == 2) wait_groups<2>();
        if (left == 3) wait_groups<3>();
        if (left == 4) wait_groups<4>();
        if (left == 5) wait_groups<5>();
        sync_warp();
    }

    // The slot that is `younger` places behind the oldest.
    LC_DEVICE const u8* slot(int younger) const {
        const int place = oldest + younger;
        return slots + (place < count ? place : place - count) * kSlotBytes;
    }

    // Gives the oldest slot to what comes next. A group of copies for each slot, an empty one at the end of the frame:
    // their number tells what has come.
    template <class Cursor>
    LC_DEVICE void refill(const DepthKernel& p, Cursor& ahead) {
        sync_warp();  // all lanes have read it
        if (!ahead.at_end(p)) {
            copy_chunk(p.type, slots + oldest * kSlotBytes, ahead.chunk(p));
            ahead.advance(p);
        }
        close_group();
        oldest = oldest + 1 == count ? 0 : oldest + 1;
    }
};

struct alignas(16) FourFloats {
    float at[4];
};

// Four weights that lie next to each other in a slot.
template <int kType>
LC_DEVICE FourFloats four_weights(const u8* slot, int element) {
    if constexpr (kType == kFloat32) {
        return *reinterpret_cast<const FourFloats*>(slot + element * 4);
    } else {
        const u64 bits = *reinterpret_cast<const u64*>(slot + element * 2);
        FourFloats out;
        LC_UNROLL for (int i = 0; i < 4; ++i) {
            const u16 half = u16(bits >> (16 * i));
            out.at[i] = kType == kFloat16 ? value_of_half(half) : float_of(u32(half) << 16);
        }
        return out;
    }
}

constexpr int kMostSums = 32;  // rows of a tile times rows of activations

// Adds the products of a slot, `count` elements deep, to sums [kTile, kRows]; `activations` [kRows, columns].
template <int kType, int kRows, int kTile>
LC_DEVICE void multiply_slot(float (&sums)[kMostSums], const u8* slot, int count, const float* activations,
                             int columns) {
    constexpr int kChunk = kSlotBytes / kTile / (kType == kFloat32 ? 4 : 2);
    LC_LOOP for (int k = int(lane_index()) * 4; k < count; k += kStep) {
        FourFloats weights[kTile];
        LC_UNROLL for (int m = 0; m < kTile; ++m) weights[m] = four_weights<kType>(slot, m * kChunk + k);
        LC_UNROLL for (int r = 0; r < kRows; ++r) {
            const FourFloats x = *reinterpret_cast<const FourFloats*>(activations + r * columns + k);
            LC_UNROLL for (int m = 0; m < kTile; ++m) LC_UNROLL for (int i = 0; i < 4; ++i) sums[m * kRows + r] =
                fmaf(weights[m].at[i], x.at[i], sums[m * kRows + r]);
        }
    }
}

template <int kType>
LC_DEVICE void multiply_slot(float (&sums)[kMostSums], int rows, const u8* slot, int count, const float* activations,
                             int columns) {
    if (rows == 1)
        multiply_slot<kType, 1, 1>(sums, slot, count, activations, columns);
    else if (rows == 2)
        multiply_slot<kType, 2, 2>(sums, slot, count, activations, columns);
    else if (rows <= 4)
        multiply_slot<kType, 4, 4>(sums, slot, count, activations, columns);
    else
        multiply_slot<kType, 8, 4>(sums, slot, count, activations, columns);
}

// The products of a tile with all rows of activations, zeros behind their depth. Each sum is taken in the same order
// however many rows there are. Lane i gets sum i of [tile rows, padded rows].
LC_DEVICE float multiply_tile(const DepthKernel& p, const float* activations, DepthRing& ring, TileCursor& ahead,
                              int depth) {
    const int chunk = chunk_of(p), count = tile_rows(p.rows) * padded_rows(p.rows);
    float sums[kMostSums];
    LC_UNROLL for (int i = 0; i < kMostSums; ++i) sums[i] = 0;
    LC_LOOP for (int first = 0; first < depth; first += chunk) {
        ring.wait(1);
        const u8* slot = ring.slot(0);
        const int left = (depth - first + kStep - 1) / kStep * kStep, deep = left < chunk ? left : chunk;
        if (p.type == kFloat32)
            multiply_slot<kFloat32>(sums, p.rows, slot, deep, activations + first, p.columns);
        else if (p.type == kBFloat16)
            multiply_slot<kBFloat16>(sums, p.rows, slot, deep, activations + first, p.columns);
        else
            multiply_slot<kFloat16>(sums, p.rows, slot, deep, activations + first, p.columns);
        ring.refill(p, ahead);
    }
    float own = 0;
    LC_UNROLL for (int i = 0; i < kMostSums; ++i) {
        if (i >= count) continue;
        const float sum = warp_sum(sums[i]);
        if (int(lane_index()) == i) own = sum;
    }
    return own;
}

}  // namespace longcat::cuda
