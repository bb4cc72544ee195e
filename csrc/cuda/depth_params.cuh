// What the kernel of depth_decode is given, and how it divides shared memory.
#pragma once

#include "cuda/device.cuh"

namespace longcat::cuda {

constexpr int kDepthLevels = 32, kDepthLayers = 16, kDepthRows = 8, kDepthHead = 256;  // the most of each
constexpr u32 kDepthThreads = 384, kDepthWarps = kDepthThreads / kWarp;
constexpr int kSlotBytes = 2048, kFewestSlots = 2, kMostSlots = 6;  // of a warp's ring
constexpr int kStep = 128;                                          // elements of depth that a warp multiplies at once

enum Conditioning : int { kSum = 0, kLast = 1, kLastAndHidden = 2 };

// A matrix of each weight set, its rows' elements adjacent; strides in elements, null where absent.
struct DepthMatrix {
    const void* data;
    i64 set, row;
};

struct DepthVector {  // of each weight set
    const void* data;
    i64 set;
};

struct DepthLayer {
    const void *norm1, *norm2, *q_norm, *k_norm;
    DepthMatrix q, k, v, out, gate, up, down;
    DepthVector q_bias, k_bias, v_bias, out_bias;
};

struct DepthLevel {
    const void *table, *head, *head_bias;
    i64 table_row, head_row, first_logit;  // the last: column of the level's logits in the output
    int classes;
    u8 attention_set, ffn_set, projection_set, norm_set;
};

// Memory between stages, float32: [rows, ...]; caches [layers, rows, levels, kv heads * head channels].
struct DepthMemory {
    u32* arrived;  // at grid barriers, zero at first
    float *z, *qkv, *mixed, *gate, *up, *logits, *scores, *keys, *values, *total, *input;
    int* ended;     // all codes so far are "end"
    u16* elements;  // [rows, columns]: what a product on tensor cores reads, bfloat16
};

struct DepthKernel {
    int rows, levels, hidden, dim, layers, heads, kv_heads, head_dim, ffn, given, conditioning, ends, gated, type;
    int width, most_classes, slots, columns;  // of tables; of any level; of a ring; of a row that a product reads
    float eps;
    const void *input_norm, *hidden_rows, *start;
    DepthMatrix projection;
    DepthVector projection_bias, final_norm;
    const float* rope;  // [2, levels, head_dim / 2]
    DepthLayer layer[kDepthLayers];
    DepthLevel level[kDepthLevels];
    const float* params;  // [rows, levels, 8]
    i64 params_row, params_level, step_stride;
    const i64 *seeds, *steps, *prefix, *leaders, *history, *offsets;
    i64 prefix_width, prefix_row, history_rows;
    const bool* active;
    float *logprobs, *drawn_logprobs, *logits;  // logits [rows, logit_width], or null
    i64 logit_width;
    void* embedding;
    i64* codes;
    DepthMemory memory;

    LC_BOTH i64 leader(int row) const {
        const i64 found = leaders == nullptr ? row : leaders[row];
        return found < 0 || found >= rows ? row : found;  // on a device nobody has checked it
    }
    LC_BOTH bool is_active(int row) const { return active == nullptr || active[leader(row)]; }
    LC_BOTH int query_width() const { return heads * head_dim; }
    LC_BOTH int key_width() const { return kv_heads * head_dim; }
};

static_assert(sizeof(DepthKernel) <= 32764, "more than a kernel's parameters may be; beyond 4 KB since CUDA 12.1");

// The front of shared memory; activations and rings follow.
struct DepthShared {
    double doubles[kDepthWarps];
    u64 bins[256], found[2];
    float floats[kDepthRows][kDepthWarps];
    u32 ids[kDepthWarps];
    int flag;
};

constexpr int kDepthHeader = (sizeof(DepthShared) + 127) / 128 * 128;
constexpr int kRingBytes = int(kDepthWarps) * kSlotBytes;  // of one slot of every warp

// The kernel for many rows: strips of weights, how many at a time; rows of activations that a block takes, and the most
// there are; how deep all warps go in a turn; a strip's sums.
constexpr int kStripRows = 16, kStripDepth = 64, kMostStrips = 3;
constexpr int kGroupRows = 32, kMmaRows = 256;
constexpr int kTurnDepth = int(kDepthWarps) * kStripDepth, kStripSums = kStripRows * kGroupRows;
constexpr int kMmaSumBytes = int(kDepthWarps) * kStripSums * int(sizeof(float)), kCursorBytes = 128;
constexpr int kMmaFixedBytes = kDepthHeader + kMmaSumBytes + int(kDepthWarps) * kCursorBytes;

// Rows are multiplied 1, 2, 4 or 8 at a time, by as many rows of weights as pay for reading the activations.
LC_BOTH int padded_rows(int rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }
LC_BOTH int tile_rows(int rows) { return rows <= 2 ? rows : 4; }

}  // namespace longcat::cuda
