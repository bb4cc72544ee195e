// The screen of rvq_encode on Hopper: a warp-specialised matrix product by wgmma.
//
// A cluster of two blocks takes 256 rows and sweeps one part of the codebook, a tile of 256 codewords at a time; each
// block has 128 of the rows. Of each stage a block loads its own rows and half of the codewords, which go to both
// (multicast): so a stage costs 32 KB of level-two reads for 48 KB of operands. One thread of the first warpgroup
// produces; two warpgroups of 64 rows x 256 codewords consume, and keep in registers what their rows have found.
//
// Barriers. `full[s]` of a block completes when its producer has arrived and all 48 KB are there, its own loads and the
// other block's half. `empty[s]` completes when all 16 consumer warps of both blocks have read stage s of their block:
// only then may this block's producer overwrite it in both. A load of the other block may come before this block's
// producer has announced the bytes: the phase cannot complete without that arrival.
#pragma once

#include "cuda/rvq_coarse.cuh"

namespace longcat::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Stages {
    u32 memory;    // kWgmmaStages times rows, then words; at a multiple of 1024
    u32 barriers;  // full, then empty

    LC_DEVICE u32 rows(u32 stage) const { return memory + stage * kWgmmaStageBytes; }
    LC_DEVICE u32 words(u32 stage) const { return rows(stage) + kWgmmaRowBytes; }
    LC_DEVICE u32 full(u32 stage) const { return barriers + stage * 8; }
    LC_DEVICE u32 empty(u32 stage) const { return barriers + (kWgmmaStages + stage) * 8; }
};

LC_DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

LC_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

LC_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

LC_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// No wider order than the block's is asked for, which would cost a fence of the whole device at every stage: what the
// barriers guard is written by the copy engine, which completes them itself, and read by wgmma, which has been waited
// for.
LC_DEVICE void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

LC_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            " selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

LC_DEVICE void copy_tile(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// To the same place in both blocks, and to the same barrier.
LC_DEVICE void copy_tile_to_both(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(u16(3))
        : "memory");
}

// sums (+)= rows x words^T: 64 x 256, sixteen deep; `adds` 0 starts from zero.
LC_DEVICE void wgmma(float (&sums)[128], u64 rows, u64 words, u32 adds) {
#define LC_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define LC_16(i) LC_4(i), LC_4(i + 4), LC_4(i + 8), LC_4(i + 12)
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
        "}, %128, %129, p, 1, 1, 0, 0;\n}"
        : LC_16(0), LC_16(16), LC_16(32), LC_16(48), LC_16(64), LC_16(80), LC_16(96), LC_16(112)
        : "l"(rows), "l"(words), "r"(adds));
#undef LC_16
#undef LC_4
}

LC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
LC_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps reads of the sums behind the wait before it.
LC_DEVICE void pin(float (&sums)[128]) {
    LC_UNROLL for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// The order in which producer and consumers of a cluster walk: every unit, tile and step of depth.
struct Walk {
    const RvqCoarse& p;
    int clusters, depths;

    template <class Tile>
    LC_DEVICE void units(Tile&& body) const {
        for (int index = int(block_index() / kWgmmaCluster); index < p.schedule.units(); index += clusters)
            body(p.schedule.unit(index));
    }
};

LC_DEVICE void produce(const RvqCoarse& p, const Walk& walk, const Stages& stages) {
    const int rank = int(cluster_rank());
    Ring ring = {0, 0};
    walk.units([&](const Schedule::Unit& unit) {
        const int row = (unit.row_block * int(kWgmmaCluster) + rank) * kTileRows;
        for (int tile = unit.first_tile; tile < unit.end_tile; ++tile)
            for (int depth = 0; depth < walk.depths; ++depth, ring.advance(kWgmmaStages)) {
                const u32 full = stages.full(ring.index);
                barrier_wait(stages.empty(ring.index), ring.parity ^ 1);
                barrier_expect(full, kWgmmaStageBytes);
                copy_tile(stages.rows(ring.index), p.row_map, depth * kTileDepth, row, full);
                copy_tile_to_both(stages.words(ring.index) + u32(rank) * (kWgmmaWordBytes / 2), p.word_map,
                                  depth * kTileDepth, tile * kTileWords + rank * (kTileWords / 2), full);
            }
    });
}

// A warp says to both blocks that it has read a stage.
LC_DEVICE void release(const Stages& stages, u32 stage) {
    if (lane_index() < kWgmmaCluster) barrier_arrive(stages.empty(stage), lane_index());
}

// One tile of codewords: sums of this warpgroup's 64 rows with 256 words.
LC_DEVICE void multiply_tile(float (&sums)[128], const Stages& stages, Ring& ring, int depths, u32 warpgroup) {
    u32 before = 0;
    for (int depth = 0; depth < depths; ++depth) {
        barrier_wait(stages.full(ring.index), ring.parity);
        const u64 rows = wgmma_descriptor(stages.rows(ring.index) + warpgroup * (kWgmmaRowBytes / 2));
        const u64 words = wgmma_descriptor(stages.words(ring.index));
        wgmma_fence();
        LC_UNROLL for (u32 k = 0; k < kTileDepth / 16; ++k)  // 32 bytes further, >> 4
            wgmma(sums, rows + 2 * k, words + 2 * k, u32(depth) | k);
        wgmma_commit();
        wgmma_wait<1>();
        if (depth > 0) release(stages, before);
        before = ring.index;
        ring.advance(kWgmmaStages);
    }
    wgmma_wait<0>();
    pin(sums);
    release(stages, before);
}

LC_DEVICE void consume(const RvqCoarse& p, const Walk& walk, const Stages& stages) {
    const u32 warpgroup = thread_index() / 128 - 1, warp = thread_index() / kWarp % 4, rank = cluster_rank();
    Ring ring = {0, 0};
    float sums[128];
    walk.units([&](const Schedule::Unit& unit) {
        const i64 first = i64(unit.row_block * int(kWgmmaCluster) + int(rank)) * kTileRows + warpgroup * 64 +
                          warp * 16 + lane_index() / 4;
        Nearest state[2];
        RowBound row[2];
        start_rows(state, row, p.rows, first);
        for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
            multiply_tile(sums, stages, ring, walk.depths, warpgroup);
            LC_UNROLL for (int group = 0; group < kTileWords / 32; ++group) {
                float product[2][8];
                LC_UNROLL for (int i = 0; i < 16; ++i) product[i / 8][i % 8] =
                    sums[accumulator_index(group, i / 8, i % 8)];
                consider_group(state, row, product, p.book, tile * kTileWords + group * 32 + int(lane_index() % 4) * 2);
            }
        }
        store_rows(state, p, first, unit.part);
    });
}

#endif

}  // namespace longcat::cuda

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" __global__ void __cluster_dims__(longcat::cuda::kWgmmaCluster, 1, 1)
    __launch_bounds__(longcat::cuda::kWgmmaThreads, 1) rvq_coarse_wgmma(LC_PARAMS(longcat::cuda::RvqCoarse) p) {
    using namespace longcat::cuda;
    extern __shared__ u8 dynamic[];
    const u32 start = (u32(__cvta_generic_to_shared(dynamic)) + 1023) & ~1023u;
    const Stages stages = {start, start + kWgmmaStages * kWgmmaStageBytes};
    if (thread_index() == 0) {
        for (u32 stage = 0; stage < kWgmmaStages; ++stage) {
            barrier_init(stages.full(stage), 1);
            barrier_init(stages.empty(stage), 8 * kWgmmaCluster);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    const Walk walk = {p, int(gridDim.x / kWgmmaCluster), p.rows.columns / kTileDepth};
    if (thread_index() < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (thread_index() == 0) produce(p, walk, stages);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(p, walk, stages);
    }
    cluster_sync();  // the other block may still write here, or arrive at a barrier
}

#endif
