// One call's rows and memory.
#pragma once

#include <vector>

#include "depth_sampler.h"
#include "depth_stream.h"

namespace longcat {

// Hands out parts of one block of memory, on cache lines; without a block it only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        const int64_t begin = used;
        used += ceil_div(count * int64_t(sizeof(T)), kLine) * kLine;
        return base == nullptr ? nullptr : reinterpret_cast<T*>(base + begin);
    }
};

// A row that is active, and the follower that lends it its logits.
struct DepthRow {
    int64_t row, leader;  // in the call; among the active rows
    int64_t follower;     // among the active rows, or -1
    bool ended;           // all codes so far are "end"
};

std::vector<DepthRow> active_rows(const DepthDecode& p);

// Memory of all rows.
struct DepthMemory {
    int64_t hidden_pitch, dim_pitch, mixed_pitch, act_pitch;  // bytes of rows of elements
    int64_t logits_pitch;
    float* vectors;                 // of unpacked weights
    float *hidden, *input, *total;  // [rows, H], [rows, E], [rows, E]
    float *z, *q, *keys, *values;   // keys, values: [layers, rows, levels, K C]
    char *mixed, *act;
    float* logits;

    void lay_out(Arena& arena, const DepthDecode& p, const DepthKernels& kernels, int64_t rows);
};

// Memory of one thread.
struct DepthDesk {
    Worker worker;
    char *wide, *narrow;  // rows of elements [rows, H], [rows, D]
    float *head, *draw;   // a head, a draw

    void lay_out(Arena& arena, const DepthDecode& p, const DepthKernels& kernels, const DepthMemory& memory,
                 int64_t rows);
};

}  // namespace longcat
