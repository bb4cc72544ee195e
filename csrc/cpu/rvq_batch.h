// What encoding level by level (rvq_encode.cpp) and by the Gram form (rvq_gram.cpp) share.
#pragma once

#include <limits>
#include <vector>

#include "buffer.h"
#include "longcat/rvq_encode.h"
#include "rvq_kernels.h"

namespace longcat::rvq {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline bool is_kept(const RvqEncode& p, int64_t row) { return p.mask == nullptr || p.mask[row]; }

// One thread's share of a batch.
struct Share {
    int64_t first_tile, last_tile;
    double* terms;
};

// Rows that are encoded together, and the memory for it.
struct Batch {
    const RvqEncode& p;
    int64_t first, rows;  // of x
    int64_t stride;       // of a prepared row, in units
    uint32_t* units;
    Tile* tiles;
    float* sums;      // [rows, dim] of the codewords, from the first level to the last
    double* squares;  // [rows, levels] of the residual after each level
    std::vector<double*> terms;

    const RvqKernels& kernels(size_t level) const {
        return rvq_kernels(p.packed.empty() ? p.isa : p.packed[level].isa);
    }

    // Calls body(share) on every thread.
    template <class Body>
    void share(size_t level, const Body& body) const {
        const int64_t count = ceil_div(rows, kernels(level).tile_rows), threads = int64_t(terms.size());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t t = 0; t < threads; ++t)
            body(Share{t * count / threads, (t + 1) * count / threads, terms[size_t(t)]});
    }
};

// Readies a thread's tiles for a codebook with this centre.
void start_tiles(const Batch& batch, size_t level, const float* centre, const Share& share);

// Chooses and writes the code of a row, which lies in lane `lane` of the tile: -1 where it is left out.
int64_t choose(const Batch& batch, const RvqKernels& kernels, size_t level, const Part& part, Tile& tile, int lane,
               int64_t row);

// Takes a codeword off the row's residual, and gives the square of what is left; a negative code takes nothing off.
double take_off(const Batch& batch, const RvqKernels& kernels, size_t level, const Part& part, int64_t row,
                int64_t code);

// Encodes all levels of a batch by the products of the one codebook that they share.
void encode_by_gram(const Batch& batch);

}  // namespace longcat::rvq
