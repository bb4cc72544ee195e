// The screen of rvq_encode on tensor cores since Ampere: mma.sync, operands by cp.async and ldmatrix.
//
// A block takes 128 rows and sweeps one part of the codebook, 128 codewords at a time; its eight warps stand four by
// two and have 32 rows x 64 codewords each. The two warps of the same rows write a list each. Steps of 64 elements of
// depth flow through three stages of shared memory without a stop at the end of a tile.
#pragma once

#include "cuda/rvq_coarse.cuh"

namespace longcat::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// Sixteen bytes to shared memory; zeros where `exists` is false.
LC_DEVICE void copy_async(u32 to, const u16* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

LC_DEVICE void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

LC_DEVICE void mma(float* sums, const u32 (&rows)[4], u32 words0, u32 words1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(words0), "r"(words1));
}

// Step `step` of a unit: which codewords, how deep.
struct MmaStep {
    int word, depth;

    LC_DEVICE MmaStep(const Schedule::Unit& unit, int depths, int step)
        : word(unit.first_tile * kTileWords + step / depths * kMmaWords), depth(step % depths * kTileDepth) {}
};

LC_DEVICE void fill_stage(const RvqCoarse& p, u32 stage, i64 first_row, const MmaStep& step) {
    LC_UNROLL for (u32 i = 0; i < kMmaOperandBytes / 16 / kMmaThreads; ++i) {
        const u32 chunk = i * kMmaThreads + thread_index(), row = chunk / 8;
        const bool exists = first_row + row < p.rows.count;
        const i64 from = exists ? first_row + row : 0;
        const i64 column = step.depth + chunk % 8 * 8;
        copy_async(stage + swizzled(row, chunk % 8), p.rows.halves + from * p.rows.columns + column, exists);
        copy_async(stage + kMmaOperandBytes + swizzled(row, chunk % 8),
                   p.book.halves + i64(step.word + int(row)) * p.book.columns + column, true);
    }
}

// Adds one stage's products to this warp's 32 x 64 sums.
LC_DEVICE void multiply_stage(float (&sums)[2][32], u32 stage, u32 first_row, u32 first_word) {
    const u32 lane = lane_index();
    LC_UNROLL for (u32 k = 0; k < kTileDepth / 16; ++k) {
        u32 rows[2][4], words[4][4];
        LC_UNROLL for (u32 m = 0; m < 2; ++m) load_matrices(rows[m], stage + row_fragment(first_row + m * 16, k, lane));
        LC_UNROLL for (u32 n = 0; n < 4; ++n)
            load_matrices(words[n], stage + kMmaOperandBytes + word_fragment(first_word + n * 16, k, lane));
        LC_UNROLL for (u32 m = 0; m < 2; ++m) LC_UNROLL for (u32 n = 0; n < 8; ++n)
            mma(&sums[m][n * 4], rows[m], words[n / 2][n % 2 * 2], words[n / 2][n % 2 * 2 + 1]);
    }
}

#endif

}  // namespace longcat::cuda

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

LC_KERNEL(longcat::cuda::kMmaThreads) rvq_coarse_mma(LC_PARAMS(longcat::cuda::RvqCoarse) p) {
    using namespace longcat::cuda;
    extern __shared__ u8 dynamic[];
    const u32 memory = (u32(__cvta_generic_to_shared(dynamic)) + 1023) & ~1023u;
    const Schedule::Unit unit = p.schedule.unit(int(block_index()));
    const i64 block_row = i64(unit.row_block) * kTileRows;
    const u32 warp_row = thread_index() / kWarp % 4 * 32, warp_word = thread_index() / kWarp / 4 * 64;
    const int depths = p.rows.columns / kTileDepth;
    const int steps = (unit.end_tile - unit.first_tile) * (kTileWords / kMmaWords) * depths;
    Nearest state[2][2];
    RowBound row[2][2];
    float sums[2][32];
    LC_UNROLL for (int m = 0; m < 2; ++m)
        start_rows(state[m], row[m], p.rows, block_row + warp_row + m * 16 + lane_index() / 4);
    for (u32 step = 0; step + 1 < kMmaStages; ++step) {
        if (int(step) < steps)
            fill_stage(p, memory + step * 2 * kMmaOperandBytes, block_row, MmaStep(unit, depths, int(step)));
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    u32 stage = 0, next = kMmaStages - 1;
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kMmaStages - 2) : "memory");
        sync_block();  // this step's stage is full, and all have read the one that is filled next
        const int ahead = step + int(kMmaStages) - 1;
        if (ahead < steps) fill_stage(p, memory + next * 2 * kMmaOperandBytes, block_row, MmaStep(unit, depths, ahead));
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (step % depths == 0) LC_UNROLL for (int i = 0; i < 64; ++i) sums[i / 32][i % 32] = 0;
        multiply_stage(sums, memory + stage * 2 * kMmaOperandBytes, warp_row, warp_word);
        stage = stage + 1 == kMmaStages ? 0 : stage + 1;
        next = next + 1 == kMmaStages ? 0 : next + 1;
        if (step % depths != depths - 1) continue;
        const int word = MmaStep(unit, depths, step).word + int(warp_word) + int(lane_index() % 4) * 2;
        LC_UNROLL for (int m = 0; m < 2; ++m) LC_UNROLL for (int group = 0; group < 2; ++group) {
            float product[2][8];
            LC_UNROLL for (int i = 0; i < 16; ++i) product[i / 8][i % 8] =
                sums[m][accumulator_index(group, i / 8, i % 8)];
            consider_group(state[m], row[m], product, p.book, word + group * 32);
        }
    }
    LC_UNROLL for (int m = 0; m < 2; ++m) store_rows(state[m], p, block_row + warp_row + m * 16 + lane_index() / 4,
                                                     unit.part * int(kMmaLists) + int(thread_index() / kWarp / 4));
}

#endif
