// Which codewords can be the nearest to a row, judged from a float16 product of both: the certified window.
//
// Definition (reference/rvq_encode.py): the code of row r is the k of the least S_k = fl64(|c_k|^2 - 2 r.c_k). With m
// the codebook's centre, d_k = c_k - m and rho = r - m, exactly, |c_k|^2 - 2 r.c_k = 2 s_k + (what k does not change),
//
//     s_k = |d_k|^2 / 2 - rho.d_k.
//
// The tensor cores give p_k, near rho^.d^_k, where rho^ and d^ are rho and d scaled by powers of two and rounded to
// float16; a_k = |d_k|^2 / 2 - p_k is what s_k is judged by. Then |S_k / 2 - a_k| (up to the common constant) is at
// most
//
//     E_k = |rho - rho^| |d_k|                    rounding of the row
//         + |rho^| |d_k - d^_k|                   rounding of the codeword
//         + g |rho^| |d^_k|                       accumulation in the tensor core
//         + 2^-20 (|d_k|^2 / 2 + |rho^| |d^_k|)   float32 evaluation of a_k -+ E_k: six roundings of 2^-24 each
//         + 2^-47 ((|r| + |m|)^2 + |d_k|^2)       float64 rounding of S_k: a tree of depth at most 16 and three more
//         + 2^-120                                float32 underflow anywhere
//
// by Cauchy-Schwarz on rho.d - rho^.d^ = (rho - rho^).d + rho^.(d - d^). Tensor cores truncate each addend of a step of
// n products to at least 23 bits below the largest of them and of the running sum, none of which exceeds |rho^| |d^|:
// with n >= 4, at most (n + 2) / n * D 2^-23 = 3 D 2^-24 in all (arXiv 2512.07004 measured the formats), so that
// g = 4 (D + 16) 2^-24 holds; IEEE accumulation needs D 2^-24.
//
// Hence S_w <= S_k for all k means a_w - E_w <= a_k + E_k: the nearest codeword, and any that ties with it, has its
// lower bound at or under U = min_k (a_k + E_k). Only those are scored exactly, and one alone needs no score. As norms
// enter per row and per codeword, E_k = on_length length_k + on_error error_k + slack + 2^-20 half_k with `length_k` >=
// |d_k|, `error_k` >= |d_k - d^_k|. Rows whose squares could leave float32 (beyond 2^+-40) have a slack beyond all
// scores, hence every codeword in the window; such codewords have infinite `half` and `length`, whose difference, not a
// number, stands for a lower bound of -infinity. Codewords that are never chosen have infinite `half` and no length.
#pragma once

#include "cuda/device.cuh"

namespace longcat::cuda {

// Of a row: a_k = half_k - scale * (product of the scaled float16 vectors), and the parts of E_k.
struct alignas(16) RowBound {
    float scale, on_length, on_error, slack;
};

// What one sweep over codewords knows of a row: the least upper bound, the four least lower bounds with their
// codewords, and the least lower bound left out. Some codeword that may be nearest is missing if that one is not above
// `bound`.
struct Nearest {
    static constexpr int kKept = 4;
    float bound;
    float low[kKept + 1];
    int entry[kKept];
};

constexpr float kTiny = 0x1p-120f, kEvaluation = 0x1p-20f;
constexpr int kExtreme = 40;  // exponents of two beyond which squares could leave float32

LC_DEVICE bool is_extreme(float largest) {
    return largest != 0 && !(largest >= power_of_two(-kExtreme) && largest < power_of_two(kExtreme));
}

// The power of two that brings numbers of at most `largest` below 2^15, inside float16.
LC_DEVICE int scaling_exponent(float largest) { return largest == 0 ? 0 : 14 - exponent_of(largest); }

// From the squared lengths of rho^ and rho - rho^, both scaled by 2^exponent, of r and of m, each summed in float32.
// `rho_rounding`: rho itself is a rounded difference, within 2^-24 of each element.
LC_DEVICE RowBound row_bound(float rounded2, float error2, float row2, float centre2, int dim, int exponent,
                             int word_exponent) {
    const float inflate = 1 + float(dim + 64) * 0x1p-23f;  // float32 sums of squares, square roots, products
    const float unit = power_of_two(-exponent), gamma = 4 * float(dim + 16) * 0x1p-24f + kEvaluation;
    const float rounded = sqrtf(rounded2) * unit * inflate, rho_rounding = 0x1p-22f;
    const float error = sqrtf(error2) * unit * inflate + rho_rounding * rounded;
    const float whole = (sqrtf(row2) + sqrtf(centre2)) * inflate;
    return {power_of_two(-exponent - word_exponent), (error + gamma * rounded) * inflate + kTiny,
            (1 + gamma) * rounded * inflate + kTiny, 0x1p-46f * whole * whole + kTiny};
}

LC_DEVICE RowBound no_bound() { return {0, kTiny, kTiny, largest_float() / 2}; }

LC_DEVICE void start(Nearest& state) {
    state.bound = largest_float();
    LC_UNROLL for (int i = 0; i <= Nearest::kKept; ++i) state.low[i] = infinity();
    LC_UNROLL for (int i = 0; i < Nearest::kKept; ++i) state.entry[i] = 0;
}

// Puts a codeword at its place among the kept ones; the last falls out.
LC_DEVICE void insert(Nearest& state, float low, int entry) {
    LC_UNROLL for (int i = 0; i < Nearest::kKept; ++i) {
        const bool before = low < state.low[i];
        const float other_low = state.low[i];
        const int other_entry = state.entry[i];
        state.low[i] = before ? low : other_low;
        state.entry[i] = before ? entry : other_entry;
        low = before ? other_low : low;
        entry = before ? other_entry : entry;
    }
    state.low[Nearest::kKept] = fminf(state.low[Nearest::kKept], low);
}

// Everything that `other` knows as well.
LC_DEVICE void merge(Nearest& state, const Nearest& other) {
    state.bound = fminf(state.bound, other.bound);
    LC_UNROLL for (int i = 0; i < Nearest::kKept; ++i) insert(state, other.low[i], other.entry[i]);
    state.low[Nearest::kKept] = fminf(state.low[Nearest::kKept], other.low[Nearest::kKept]);
}

// Eight products of one row, of the codewords base, base + 1, base + 8, base + 9, ..., base + 25, with what is known of
// these.
LC_DEVICE void consider(Nearest& state, const RowBound& row, const float (&product)[8], const float (&half)[8],
                        const float (&length)[8], const float (&error)[8], int base) {
    float low[8], wide[8];
    u32 near = 0;
    LC_UNROLL for (int i = 0; i < 8; ++i) {
        wide[i] = fmaf(row.on_length, length[i], fmaf(row.on_error, error[i], row.slack));
        low[i] = fmaf(-row.scale, product[i], half[i] * (1 - kEvaluation)) - wide[i];
        near |= u32(!(low[i] > state.bound)) << i;
    }
    while (near != 0) {  // rare after the first codewords
        const int i = int(lowest_bit(near));
        near &= near - 1;
        float lower = low[0], width = wide[0], middle = half[0];
        LC_UNROLL for (int j = 1; j < 8; ++j) {
            lower = i == j ? low[j] : lower;
            width = i == j ? wide[j] : width;
            middle = i == j ? half[j] : middle;
        }
        lower = lower == lower ? lower : -infinity();
        // low is a_k (1 -+ ...) - width: two more widths, and half's share again, are above a_k + E_k.
        const float upper = lower + 2 * width + 3 * kEvaluation * middle;
        if (lower <= state.bound) insert(state, lower, base + (i >> 1) * 8 + (i & 1));
        state.bound = fminf(state.bound, upper);
    }
}

// The four lanes that share a row put together what they know.
LC_DEVICE void merge_quad(Nearest& state) {
    for (u32 mask = 1; mask < 4; mask *= 2) {
        Nearest other;
        other.bound = shuffle_xor(state.bound, mask);
        LC_UNROLL for (int i = 0; i <= Nearest::kKept; ++i) other.low[i] = shuffle_xor(state.low[i], mask);
        LC_UNROLL for (int i = 0; i < Nearest::kKept; ++i) other.entry[i] = int(shuffle_xor(u32(state.entry[i]), mask));
        merge(state, other);
    }
}

}  // namespace longcat::cuda
