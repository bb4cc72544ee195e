// The inner loops of matrix products of ragged groups, compiled for each instruction set.
//
// A product c[i, j] = sum over k of a[i, k] b[k, j] is made of tiles of at most `tile_rows` rows by one panel of
// columns. Each element of c is one chain of multiply-adds from the first k to the last, whatever tile it is in: its
// bits do not depend on how many rows or columns there are, nor on who computes them. Elements are float32, or pairs of
// bfloat16 along k where the processor multiplies those.
#pragma once

#include <cstdint>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

constexpr int kMostTileRows = 12, kMostPanelColumns = 32;
constexpr int kFewRows = 6;  // that do not pay for packing

// A matrix as lines whose elements are adjacent; line i begins `stride` elements times index[i], or i, after `data`.
struct Lines {
    const void* data;
    DType dtype;
    int64_t stride;
    const int32_t* index = nullptr;

    template <class T>
    const T* at(int64_t line) const {
        return static_cast<const T*>(data) + (index == nullptr ? line : int64_t(index[line])) * stride;
    }
};

// Where the columns of a panel lie: two halves of lines or of elements, each a register wide when it is full.
struct Halves {
    int64_t first[2], count[2];
};

// Rows of a tile as units of four bytes: row by row `pitch` units apart, or, `by_depth`, one unit of all rows after
// the other, `pitch` units apart.
struct TileRows {
    const uint32_t* units;
    int64_t pitch;
    bool by_depth;
    int count;
};

// What a product asks the caches for meanwhile: `count` lines, `step` bytes apart.
struct Ahead {
    const char* from;
    int64_t step, count;
};

// Or what it packs meanwhile: pieces [first, last) of the next panel, one every `every` units of its own depth. Piece i
// is four units of depth of half i % 2 of the columns; as many bytes of the panel after that are asked for.
struct Pieces {
    const char *lines[2], *after[2];  // the first column of each half, in units; all are there
    int64_t stride;                   // bytes from column to column
    uint32_t* panel;
    int64_t first, last, every;
};

// A tile of up and gate projections, and what becomes of it.
struct SwigluTile {
    const float* tile;  // rows of a panel: gate | up
    int64_t rows, count;
    void* act;  // [rows] elements of products, silu(gate) * up; rows `act_pitch` elements apart
    int64_t act_pitch;
    void *gate, *up;  // null, or where rows of pre-activations of type `dtype` go, `hidden_pitch` elements apart
    DType dtype;
    int64_t hidden_pitch;
};

// A tile of gradients of the activation, and what becomes of it.
struct SwigluGradTile {
    const float* tile;
    int64_t rows, count;
    const void *gate, *up;      // rows of pre-activations of type `dtype`, `pitch` elements apart
    void *grad_gate, *grad_up;  // the same for their gradients
    DType dtype;
    int64_t pitch;
    const float* weights;  // [rows]
    float* by_weight;      // [rows], `by_weight_pitch` apart: sum of gradient times activation over these columns
    int64_t by_weight_pitch;
};

// The functions of one instruction set.
struct GemmKernels {
    int tile_rows, panel_columns, step;  // step: elements of a unit

    // Lines as rows of units, `pitch` apart; zeros fill up the last unit.
    void (*pack_rows)(const Lines& lines, int64_t first, int64_t count, int64_t depth, uint32_t* out, int64_t pitch);

    // Lines are steps of depth: their elements [first, first + count) by depth, filled up with zeros to `width`.
    void (*pack_steps)(const Lines& lines, int64_t depth, int64_t first, int64_t count, int64_t width, uint32_t* out,
                       int64_t pitch);

    // Lines are columns: those of a panel, filled up with zeros.
    void (*pack_columns)(const Lines& lines, const Halves& halves, int64_t depth, uint32_t* panel);

    // out[i * pitch + j] = the product of row i with column j of the panel; with `add` the chain of what is there goes
    // on.
    void (*product)(const TileRows& rows, const uint32_t* panel, int64_t units, const Ahead& ahead, float* out,
                    int64_t pitch, bool add);

    // The same of rows row by row, which packs meanwhile.
    void (*packing_product)(const TileRows& rows, const uint32_t* panel, int64_t units, const Pieces& pieces,
                            float* out, int64_t pitch, bool add);

    // The same for at most `kFewRows` rows by row, and columns that are not packed.
    void (*stream)(const TileRows& rows, const Lines& lines, const Halves& halves, int64_t depth, float* out,
                   int64_t pitch, bool add);

    // Rounds rows of a tile to `dtype`, or adds them to what is there.
    void (*store)(const float* tile, int64_t tile_pitch, int64_t rows, int64_t count, void* out, DType dtype,
                  int64_t pitch, bool add);

    void (*swiglu)(const SwigluTile& tile);
    void (*swiglu_grad)(const SwigluGradTile& tile);

    // silu(gate) * up * weight of elements [first, first + count) of each row, as elements of products:
    // out[i * pitch + j].
    void (*activate)(const Lines& gate, const Lines& up, const float* weights, int64_t rows, int64_t first,
                     int64_t count, void* out, int64_t pitch);

    // sum[j] = scales[0] * lines[0][j] + scales[1] * lines[1][j] + ..., in this order.
    void (*weighted_sum)(const float* const* lines, const float* scales, int64_t lines_count, int64_t count,
                         float* sum);

    // sum[j] += scale * line[j].
    void (*add_scaled)(const void* line, DType dtype, float scale, int64_t count, float* sum);

    // Sum of products in a fixed order.
    float (*dot)(const void* a, const void* b, DType dtype, int64_t count);
};

// Those for products of elements of `dtype` on `isa`: bfloat16 pairs are used only where both have them.
const GemmKernels& gemm_kernels(Isa isa, DType dtype);

}  // namespace longcat
