// What the kernels of rvq_encode are given: plain data, the same for host and device.
#pragma once

#include "cuda/rvq_window.cuh"
#include "cuda/tiles.cuh"

namespace longcat::cuda {

// Threads of a block, and what a block of the two tensor-core screens needs.
constexpr u32 kRowThreads = 128, kPackThreads = 128, kGatherThreads = 256, kPlainThreads = 256;

constexpr u32 kMmaThreads = 256, kMmaStages = 3, kMmaLists = 2;
constexpr int kMmaWords = 128;
constexpr u32 kMmaOperandBytes = kTileRows * kTileDepth * 2;  // of rows, and of as many words
constexpr u32 kMmaSharedBytes = 1024 + kMmaStages * 2 * kMmaOperandBytes;

constexpr u32 kWgmmaThreads = 384, kWgmmaStages = 4, kWgmmaCluster = 2;
constexpr u32 kWgmmaRowBytes = kTileRows * kTileDepth * 2, kWgmmaWordBytes = kTileWords * kTileDepth * 2;
constexpr u32 kWgmmaStageBytes = kWgmmaRowBytes + kWgmmaWordBytes;
constexpr u32 kWgmmaSharedBytes = 1024 + kWgmmaStages * (kWgmmaStageBytes + 16);

// A tensor map of the copy engine, as the driver encodes it; aligned as its header has it, twice what PTX asks for.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

// A codebook and the sections of its packed form: layouts.HalfLayout.
struct Codebook {
    const float* words;  // [entries, dim]
    i64 stride;
    int entries, dim;
    int padded_entries, columns;  // multiples of 256 and 64
    u16* halves;                  // [padded_entries, columns]
    double* norm;                 // [padded_entries], as the three that follow
    float *half, *length, *error;
    float* centre;  // [dim]
    int* exponent;  // [1]
};

enum RowKind : u8 { kOrdinary = 0, kNotFinite = 1, kMasked = 2 };

// Rows between levels.
struct Rows {
    i64 count;
    int dim, columns;
    float* residual;   // [count, dim]
    u16* halves;       // [count, columns]: the centred residual, scaled and rounded
    RowBound* bounds;  // [count]
    u8* kinds;         // [count]: RowKind
};

struct RvqPack {
    Codebook book;
    int chunks;    // of rows whose partial sums are kept apart
    double* sums;  // [chunks, dim + 1]: of the usable codewords; their number
    int* largest;  // [1]: bits of the greatest |element| of a usable codeword
};

struct RvqPrepare {
    Rows rows;
    Codebook next;
    const void* x;
    int type, residual_type;
    i64 row_stride, column_stride;
    const bool* mask;
};

struct RvqCoarse {
    TensorMap row_map, word_map;
    Rows rows;
    Codebook book;
    Schedule schedule;
    Nearest* nearest;  // [parts * lists of a part, rows]
};

struct RvqFinish {
    Rows rows;
    Codebook book, next;
    bool is_last;
    Schedule schedule;
    int lists;  // of a part
    const Nearest* nearest;
    int residual_type, level, levels;
    i64* codes;       // [rows, levels]
    double* squares;  // [rows] of this level
};

struct RvqLosses {
    i64 rows;
    int dim, levels;
    const double* squares;  // [levels, rows]
    const u8* kinds;
    float* losses;  // [levels]
};

constexpr int kMostLevels = 32;

struct LevelWords {
    const float* words;
    i64 stride;
    int entries;
};

// The sum of each row's codewords.
struct RvqGather {
    i64 rows;
    int dim, levels, type;
    const i64* codes;  // [rows, levels] with these strides
    i64 row_stride, level_stride;
    LevelWords books[kMostLevels];
    void* out;  // [rows, dim]
};

// A matrix of any strides.
struct Elements {
    const void* data;
    i64 row_stride, column_stride;

    LC_DEVICE float at(int type, i64 row, i64 column) const {
        return load(data, type, row * row_stride + column * column_stride);
    }
};

// The gradient of x: that of `quantized`, and of the losses through the residuals, walked again.
struct RvqBackward {
    i64 rows;
    int dim, levels, type, residual_type;
    Elements x, grad;     // [rows, dim] of `type`; grad may be null
    const i64* codes;     // [rows, levels]
    const float* scales;  // [levels], 2 grad_losses / count, or null
    LevelWords books[kMostLevels];
    void* out;
};

}  // namespace longcat::cuda
