// EMA codebook update: reference/ema_update.py defines it. Rows are sorted by code, keeping their order, and each entry
// is then written by one thread, its sum in double: so the bits depend neither on the number of threads nor on their
// timing. The entries of a panel of the packed codebook are written one after the other, and packed while they are in
// the cache.
#pragma once

#include <cstdint>
#include <optional>

#include "longcat/dtypes.h"
#include "longcat/packed_codebook.h"

namespace longcat {

struct EmaUpdate {
    int64_t rows, dim, entries;
    const void* vectors;  // [rows, dim] of `dtype`, a row's elements adjacent
    DType dtype;
    int64_t row_stride;
    const int64_t* codes;  // [rows], below `entries`; negative: left out
    double decay, eps, restart_threshold, restart_fraction, restart_count;
    int64_t seed;
    int threads;
    Isa isa;

    float* embed;                          // [entries, dim], in place
    float* embed_ema;                      // [entries, dim], in place
    float* cluster_size_ema;               // [entries], in place
    std::optional<PackedCodebook> packed;  // of embed, in place
};

// The number of restarted entries.
int64_t ema_update(const EmaUpdate& p);

}  // namespace longcat
