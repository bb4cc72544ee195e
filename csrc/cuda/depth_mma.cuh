// depth_decode for many rows: bfloat16 weights, products on tensor cores (mma.sync since Ampere), sums in float32.
//
// The stages, barriers and draws are those of depth_decode.cuh. What a product reads is made first, by all blocks, a
// block a row: normed, rounded to bfloat16, in the workspace; a barrier more for each product. A product's rows of
// weights are strips of sixteen. The grid is divided into groups of blocks for 32 rows of activations each, and the
// strips of a product over the blocks of a group, each of which takes up to three at a time. Of those its twelve warps
// take turns along depth, 64 elements a turn: such a piece of a strip fills a slot of the warp's ring
// (depth_stream.cuh), which is filled across barriers, as ever. Then the twelve sums of each element are added, always
// in the same order: a row has the same bits in any batch of this kernel.
//
// Weights are read by ldmatrix from slots whose pieces of sixteen bytes are swizzled (tiles.cuh). Activations are
// stored in the order in which the threads of m16n8k16 have them: a thread reads what it needs of 64 in two such
// pieces.
//
// Occupancy. 384 threads of at most 168 registers, as in depth_decode.cuh, of which 48 are sums (167, 166 and 134 for
// sm_80, sm_90a and sm_100a): one block on a multiprocessor. Shared memory: 3 KB of header, 26 KB for the sums of a
// strip and the warps' cursors, 24 KB a slot of the rings: 173 KB with six slots of the 227 KB that compute capability
// 9.0 and 10.0 have, 149 KB with five of the 163 KB of 8.0.
//
// Traffic. A block reads its 32 rows of activations from the level-two cache once for each run of its strips. With
// LongCat-Next's image head on an H200's 132 multiprocessors that is 1.2 bytes a byte of weights at 32 rows and 0.6 at
// 16, where all blocks are one group and each weight is read once. At 64 rows two groups read all weights, at the same
// time, so that memory gives them once, and for each byte of them 0.9 bytes of activations.
#pragma once

#include "cuda/depth_stages.cuh"
#include "cuda/tiles.cuh"

namespace longcat::cuda {

// The blocks that share 32 rows of activations, and this one's place among them.
struct RowGroup {
    int first_row, member, members;

    LC_BOTH RowGroup(int rows, int block, int blocks) {
        const int groups = (rows + kGroupRows - 1) / kGroupRows, group = block % groups;
        first_row = group * kGroupRows, member = block / groups;
        members = (blocks - group + groups - 1) / groups;
    }
};

LC_BOTH int strips_of(int rows) { return (rows + kStripRows - 1) / kStripRows; }

// All strips of a product, the parts' one after the other.
LC_BOTH int strip_count(const DepthKernel& p, int level, int index) {
    int count = 0;
    LC_LOOP for (int part = 0; part < 3; ++part) count += strips_of(part_of(p, level, index, part).rows);
    return count;
}

LC_BOTH DepthTile strip_at(const DepthKernel& p, int level, int index, int number) {
    int part = 0;
    WeightRows rows = part_of(p, level, index, 0);
    while (number >= strips_of(rows.rows)) number -= strips_of(rows.rows), rows = part_of(p, level, index, ++part);
    return {rows, part, number * kStripRows};
}

// A block's strips of a product, some at a time.
struct StripRun {
    int first, end, last;  // of this time; of all

    LC_BOTH StripRun(const RowGroup& group, int strips)
        : first(group.member * strips / group.members), last((group.member + 1) * strips / group.members) {
        end = limit();
    }
    LC_BOTH bool is_empty() const { return first == last; }
    LC_BOTH int count() const { return end - first; }
    LC_BOTH void next() { first = end, end = limit(); }

  private:
    LC_BOTH int limit() const { return last - first < kMostStrips ? last : first + kMostStrips; }
};

// Walks over all that a warp reads of a frame: products, runs of strips, turns, strips.
struct StripCursor {
    RowGroup group;
    StripRun run;
    DepthTile tile;
    int level, index, number, depth;

    LC_DEVICE StripCursor(const RowGroup& group_) : group(group_), run(group_, 0), level(0), index(-1) {}

    LC_DEVICE void start(const DepthKernel& p) { settle(p); }

    LC_DEVICE bool at_end(const DepthKernel& p) const { return level == p.levels; }

    LC_DEVICE DepthChunk chunk(const DepthKernel&) const { return {tile.rows, tile.row, kStripRows, depth, true}; }

    // To the first strip of a run that is deep enough for this warp.
    LC_DEVICE void settle(const DepthKernel& p) {
        depth = int(thread_index() / kWarp) * kStripDepth;
        while (true) {
            while (run.is_empty()) {
                if (++index == products_of(p)) index = 0, ++level;
                if (level == p.levels) return;
                run = StripRun(group, strip_count(p, level, index));
            }
            number = run.first, tile = strip_at(p, level, index, number);
            if (depth < tile.rows.depth) return;
            run.next();
        }
    }

    LC_DEVICE void advance(const DepthKernel& p) {
        if (++number == run.end) number = run.first, depth += kTurnDepth;
        if (depth >= tile.rows.depth) return run.next(), settle(p);
        tile = strip_at(p, level, index, number);
    }
};

// What a block holds during the frame.
struct MmaBlock {
    DepthShared& shared;
    float* sums;         // [warps, a strip's]
    StripCursor& ahead;  // this warp's; in shared memory, as registers are short
    RowGroup group;
    DepthRing ring;
    GridBarrier grid;

    LC_DEVICE MmaBlock(const DepthKernel& p, u8* memory)
        : shared(*reinterpret_cast<DepthShared*>(memory)),
          sums(reinterpret_cast<float*>(memory + kDepthHeader)),
          ahead(*reinterpret_cast<StripCursor*>(memory + kDepthHeader + kMmaSumBytes +
                                                thread_index() / kWarp * kCursorBytes)),
          group(p.rows, int(block_index()), int(grid_size())) {
        StripCursor first(group);
        ring.start(p, memory + kMmaFixedBytes, first);
        ahead = first;
    }

    LC_DEVICE void refill(const DepthKernel& p) {
        StripCursor next = ahead;
        sync_warp();  // all lanes have read it
        ring.refill(p, next);
        ahead = next;
    }
};
static_assert(sizeof(StripCursor) <= kCursorBytes, "a cursor is larger than its place");

// Where element k of 64 stands among a row's: those of thread q for the four instructions one after the other, for each
// depths 2 q and 2 q + 1, then those 8 further (PTX ISA, m16n8k16).
LC_BOTH int element_place(int k) { return k % 8 / 2 * 16 + k / 16 * 4 + k % 16 / 8 * 2 + k % 2; }

// What a product reads, for all blocks: normed, as bfloat16, zeros behind its depth. Without a projection it is z.
LC_DEVICE void make_elements(const DepthKernel& p, DepthShared& shared, int level, int index) {
    const Product product = product_of(p, index);
    const int depth = depth_of(p, product), end = (depth + kStripDepth - 1) / kStripDepth * kStripDepth;
    i64 first = 0;
    const void* weight = norm_before(p, level, index, first);
    const bool is_state = product == kProject && p.projection.data == nullptr;
    LC_LOOP for (int r = int(block_index()); r < p.rows; r += int(grid_size())) {
        float scale = 1;
        if (weight != nullptr) {
            float squares = 0;
            LC_LOOP for (int k = int(thread_index()); k < depth; k += int(kDepthThreads)) {
                const float x = activation(p, level, product, r, k);
                squares = fmaf(x, x, squares);
            }
            squares = block_sum<kDepthThreads>(squares, shared.floats[0]);
            scale = 1 / sqrtf(squares / float(depth) + p.eps);
        }
        LC_LOOP for (int k = int(thread_index()); k < end; k += int(kDepthThreads)) {
            float x = k < depth ? activation(p, level, product, r, k) : 0;
            if (weight != nullptr && k < depth) x *= scale * load(weight, p.type, first + k);
            if (!is_state)
                p.memory.elements[i64(r) * p.columns + k / kStripDepth * kStripDepth + element_place(k % kStripDepth)] =
                    bfloat16_of(x);
            else if (k < depth)
                p.memory.z[i64(r) * p.dim + k] = x + added_input(p, level, r, k);
        }
    }
}

struct alignas(16) FourWords {
    u32 at[4];
};

using StripFragments = float[kGroupRows / 8][4];

// Adds a turn's products with the strips of a run to this warp's sums.
LC_DEVICE void multiply_turn(const DepthKernel& p, const MmaBlock& b, int depth, int strips,
                             StripFragments (&sums)[kMostStrips]) {
    const int lane = int(lane_index()), rows = p.rows - b.group.first_row;
    const u16* elements = p.memory.elements + i64(b.group.first_row + lane / 4) * p.columns + depth + lane % 4 * 16;
    FourWords x[kGroupRows / 8][2];
    LC_UNROLL for (int n = 0; n < kGroupRows / 8; ++n) {
        if (n * 8 >= rows) break;
        const auto* from = reinterpret_cast<const FourWords*>(elements + i64(n) * 8 * p.columns);
        x[n][0] = from[0], x[n][1] = from[1];
    }
    LC_UNROLL for (int s = 0; s < kMostStrips; ++s) {
        if (s >= strips) break;
        LC_UNROLL for (int t = 0; t < kStripDepth / 16; ++t) {
            u32 weights[4];
            load_matrices(weights, b.ring.slot(s) + row_fragment(0, u32(t), u32(lane)));
            LC_UNROLL for (int n = 0; n < kGroupRows / 8; ++n) {
                if (n * 8 >= rows) break;
                const u32* pair = x[n][t / 2].at + t % 2 * 2;
                mma_bfloat16(sums[s][n], weights, pair[0], pair[1]);
            }
        }
    }
}

// Where the fragments of all warps have element (n, r) of a strip: registers 0 and 1 of a thread are of row g = n and
// of columns 2 q and 2 q + 1, 2 and 3 of row g + 8 (PTX ISA, m16n8k16).
LC_BOTH int fragment_place(int n, int r) {
    const int lane = n % 8 * 4 + r % 8 / 2;
    return (r / 8 * int(kWarp) + lane) * 4 + n / 8 * 2 + r % 2;
}

// Adds up what the warps have of a strip, and uses it.
LC_DEVICE void finish_strip(const DepthKernel& p, MmaBlock& b, int level, int index, int number,
                            const StripFragments& own) {
    auto* warp_sums = reinterpret_cast<FourWords*>(b.sums + thread_index() / kWarp * kStripSums);
    LC_UNROLL for (int n = 0; n < kGroupRows / 8; ++n) {
        FourWords words;
        LC_UNROLL for (int i = 0; i < 4; ++i) words.at[i] = bits_of(own[n][i]);
        warp_sums[n * int(kWarp) + int(lane_index())] = words;
    }
    sync_block();
    const DepthTile tile = strip_at(p, level, index, number);
    const int rows = p.rows - b.group.first_row < kGroupRows ? p.rows - b.group.first_row : kGroupRows;
    LC_LOOP for (int i = int(thread_index()); i < rows * kStripRows; i += int(kDepthThreads)) {
        const int n = i % kStripRows, r = i / kStripRows, place = fragment_place(n, r);
        float sum = 0;
        LC_UNROLL for (int warp = 0; warp < int(kDepthWarps); ++warp) sum += b.sums[warp * kStripSums + place];
        if (tile.row + n < tile.rows.rows)
            finish_product(p, level, index, tile.part, tile.row + n, b.group.first_row + r, sum);
    }
    sync_block();
}

// This block's part of a product.
LC_DEVICE void multiply_strips(const DepthKernel& p, MmaBlock& b, int level, int index) {
    StripRun run(b.group, strip_count(p, level, index));
    const int depth = depth_of(p, product_of(p, index));
    LC_LOOP for (; !run.is_empty(); run.next()) {
        StripFragments sums[kMostStrips];
        LC_UNROLL for (int i = 0; i < kMostStrips * kGroupRows / 2; ++i)
            sums[i / (kGroupRows / 2)][i / 4 % (kGroupRows / 8)][i % 4] = 0;
        LC_LOOP for (int k = int(thread_index() / kWarp) * kStripDepth; k < depth; k += kTurnDepth) {
            b.ring.wait(run.count());
            multiply_turn(p, b, k, run.count(), sums);
            LC_LOOP for (int s = 0; s < run.count(); ++s) b.refill(p);
        }
        LC_UNROLL for (int s = 0; s < kMostStrips; ++s) if (s < run.count())
            finish_strip(p, b, level, index, run.first + s, sums[s]);
    }
}

}  // namespace longcat::cuda

LC_KERNEL(longcat::cuda::kDepthThreads) depth_decode_mma(LC_PARAMS(longcat::cuda::DepthKernel) p) {
    using namespace longcat::cuda;
    MmaBlock b(p, dynamic_shared());
    LC_LOOP for (int level = 0; level < p.levels; ++level) {
        const int products = products_of(p) - (level < p.given ? 1 : 0);
        LC_LOOP for (int index = 0; index < products; ++index) {
            make_elements(p, b.shared, level, index);
            b.grid.meet(p);
            multiply_strips(p, b, level, index);
            b.grid.meet(p);
            if (product_of(p, index) != kQkv) continue;
            attend(p, level, (index - 1) / 4);
            b.grid.meet(p);
        }
        draw_level(p, b.shared, level);
        if (level + 1 < p.levels) b.grid.meet(p);
    }
}
