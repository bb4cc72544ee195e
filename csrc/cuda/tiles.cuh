// Index arithmetic of the matrix kernels, for the device, the launcher and tests: who does which tile, where an element
// stands in shared memory, and how wgmma is told so.
#pragma once

#include "cuda/device.cuh"

namespace longcat::cuda {

// The tensor-core kernels' tiles: elements of K taken at a time, 128 bytes of float16.
constexpr int kTileRows = 128, kTileWords = 256, kTileDepth = 64;

// A matrix of work units: a block of rows times a part of the codebook's tiles. Units are counted so that those at work
// at one time share their operands in the level-two cache: all parts of at most `group` row blocks come one after the
// other, row blocks fastest.
struct Schedule {
    int row_blocks, parts, word_tiles, group;

    struct Unit {
        int row_block, part, first_tile, end_tile;
    };

    LC_BOTH int units() const { return row_blocks * parts; }

    LC_BOTH int first_tile(int part) const { return part * word_tiles / parts; }

    LC_BOTH Unit unit(int index) const {
        const int before = index / (group * parts) * group;  // row blocks of the groups before
        const int inside = index - before * parts;
        const int width = row_blocks - before < group ? row_blocks - before : group;
        const int part = inside / width;
        return {before + inside % width, part, first_tile(part), first_tile(part + 1)};
    }
};

// The number of parts that ends soonest on `workers`, each part a full sweep of its tiles; at least `fewest` (each part
// keeps its own candidates), where there are as many tiles.
LC_BOTH int best_parts(int row_blocks, int word_tiles, int workers, int fewest) {
    const int most = word_tiles < 64 ? word_tiles : 64;
    int best = fewest < most ? fewest : most;
    i64 least = -1;
    for (int parts = best; parts <= most; ++parts) {
        const i64 rounds = (i64(row_blocks) * parts + workers - 1) / workers;
        const i64 time = rounds * ((word_tiles + parts - 1) / parts);
        if (least < 0 || time < least) least = time, best = parts;
    }
    return best;
}

// Byte offset of a 16-byte chunk (`chunk` < 8) of a 128-byte row in a tile whose rows lie one after the other: the
// 128-byte swizzle of the copy engine and of wgmma, an exclusive or of address bits 4-6 with bits 7-9. The tile starts
// at a multiple of 1024.
LC_BOTH u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Where a lane of ldmatrix.x4 points for step `k` of sixteen elements: for the operand of m16n8k16 that is sixteen
// rows, in the order of its registers (rows 0-7 and 8-15 of the first eight elements, then of the next), and for that
// of two times eight words (both halves of the elements of words 0-7, then of 8-15).
LC_BOTH u32 row_fragment(u32 first_row, u32 k, u32 lane) { return swizzled(first_row + lane % 16, k * 2 + lane / 16); }

LC_BOTH u32 word_fragment(u32 first_word, u32 k, u32 lane) {
    return swizzled(first_word + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2);
}

// wgmma's description of an operand in shared memory, K-major with the 128-byte swizzle (PTX ISA, "matrix descriptor"):
// address >> 4 in bits 0-13; the leading offset, unused here, in 16-29; the distance of 8 rows, 1024 bytes, >> 4 in
// 32-45; base offset 0 in 49-51; swizzle mode 1 in 62-63. Along K one advances the address inside the first 128 bytes.
LC_BOTH u64 wgmma_descriptor(u32 address) {
    return u64((address & 0x3ffffu) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// The ring of stages: the producer fills stage `index` when its `empty` barrier has completed the phase before, the
// consumers read it when `full` has completed this one.
struct Ring {
    u32 index, parity;

    LC_BOTH void advance(u32 stages) {
        if (++index == stages) index = 0, parity ^= 1;
    }
};

// Of the accumulator of an m64nNk16 or m16n8k16 product, what element `i` of a thread's group `g` of eight of one row
// stands for: row 8 `half` + lane / 4 of the warp's sixteen, column 32 g + 8 (i / 2) + 2 (lane % 4) + i % 2.
LC_BOTH constexpr int accumulator_index(int group, int half, int i) {
    return (group * 4 + i / 2) * 4 + half * 2 + i % 2;
}

}  // namespace longcat::cuda
