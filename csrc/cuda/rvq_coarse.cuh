// The screen of rvq_encode without tensor cores, for any processor; and the epilogue that the three versions share.
#pragma once

#include "cuda/rvq_params.cuh"

namespace longcat::cuda {

// Two adjacent floats by one load; the first is at an even index.
LC_DEVICE void load_pair(float* to, const float* from) {
    struct alignas(8) Pair {
        float first, second;
    };
    const Pair pair = *reinterpret_cast<const Pair*>(from);
    to[0] = pair.first, to[1] = pair.second;
}

// Eight products a row of a thread's two rows, the codewords being those of `consider`.
LC_DEVICE void consider_group(Nearest (&state)[2], const RowBound (&row)[2], const float (&product)[2][8],
                              const Codebook& book, int base) {
    float half[8], length[8], error[8];
    LC_UNROLL for (int i = 0; i < 8; i += 2) {
        load_pair(half + i, book.half + base + i * 4);
        load_pair(length + i, book.length + base + i * 4);
        load_pair(error + i, book.error + base + i * 4);
    }
    consider(state[0], row[0], product[0], half, length, error, base);
    consider(state[1], row[1], product[1], half, length, error, base);
}

// The bounds of the two rows `first` and `first` + 8 of a thread; rows that do not exist get harmless ones.
LC_DEVICE void start_rows(Nearest (&state)[2], RowBound (&row)[2], const Rows& rows, i64 first) {
    LC_UNROLL for (int i = 0; i < 2; ++i) {
        start(state[i]);
        row[i] = first + 8 * i < rows.count ? rows.bounds[first + 8 * i] : RowBound{0, 0, 0, 0};
    }
}

// Puts the four lanes of each row together and writes what the rows have found in list `list`.
LC_DEVICE void store_rows(Nearest (&state)[2], const RvqCoarse& p, i64 first, int list) {
    LC_UNROLL for (int i = 0; i < 2; ++i) {
        merge_quad(state[i]);
        const i64 t = first + 8 * i;
        if (lane_index() % 4 == 0 && t < p.rows.count) p.nearest[list * p.rows.count + t] = state[i];
    }
}

}  // namespace longcat::cuda

// A warp takes sixteen rows, spread over its lanes as tensor cores spread them.
LC_KERNEL(longcat::cuda::kPlainThreads) rvq_coarse_plain(LC_PARAMS(longcat::cuda::RvqCoarse) p) {
    using namespace longcat::cuda;
    const Schedule::Unit unit = p.schedule.unit(int(block_index()));
    const i64 first = i64(unit.row_block) * kTileRows + thread_index() / kWarp * 16 + lane_index() / 4;
    Nearest state[2];
    RowBound row[2];
    start_rows(state, row, p.rows, first);
    for (int base = unit.first_tile * kTileWords; base < unit.end_tile * kTileWords; base += 32) {
        float product[2][8] = {};
        const int column = base + int(lane_index() % 4) * 2;
        for (int d = 0; d < p.rows.columns; ++d) {
            float a[2];
            LC_UNROLL for (int i = 0; i < 2; ++i) a[i] =
                first + 8 * i < p.rows.count ? value_of_half(p.rows.halves[(first + 8 * i) * p.rows.columns + d])
                                             : 0.0f;
            LC_UNROLL for (int i = 0; i < 8; ++i) {
                const int k = column + (i >> 1) * 8 + (i & 1);
                const float b = value_of_half(p.book.halves[i64(k) * p.book.columns + d]);
                product[0][i] = fmaf(a[0], b, product[0][i]), product[1][i] = fmaf(a[1], b, product[1][i]);
            }
        }
        consider_group(state, row, product, p.book, column);
    }
    store_rows(state, p, first, unit.part);
}
