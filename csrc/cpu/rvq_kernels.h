// The inner loops of rvq_encode, compiled for each instruction set, and why their answer is exact.
//
// Notation: r is a row, c_k are the codewords, m is the centre, rho = r - m, d_k = c_k - m; x^ is x rounded to the
// screen's element type, float32 or bfloat16; D is the width and u = 2^-24. In the code,
//
//     start_k, slack_k, length_k, error_k    PackedCodebook::start[k], slack[k], length[k], error[k]
//     A, B, margin                           RowBounds::by_length, by_error, margin
//     g                                      accumulation(D, run) of rvq_kernels.cpp
//     a_k + E_k                              Candidates::high
//     max_j (a_j - E_j - 2 slack_j) - margin Tile::bound
//     H                                      RvqEncode::gram
//
// Then
//
//     |c_k|^2 - 2 r.c_k  =  -2 t_k + constant of the row,      t_k = rho.d_k - |d_k|^2 / 2,
//
// so the nearest codeword has the largest t. The screen computes
//
//     a_k = fl(start_k + rho^_0 d^_0 + rho^_1 d^_1 + ...),     start_k ~ slack_k - |d_k|^2 / 2,
//
// in float32, each addition rounded once (bfloat16 products are exact in float32). Products are summed in runs, and
// each run's sum is then added to those before it, so that a product meets at most n = min(D, run) + ceil(D / run) + 1
// additions. With g = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1) and
// Cauchy-Schwarz,
//
//     |a_k - slack_k - t_k|  <=  |rho - rho^| |d_k| + |rho^| |d_k - d^_k| + g |rho^| |d^_k| + g (|d_k|^2 / 2 +
//     slack_k).
//
// The kernel's bound on the right-hand side is E_k + slack_k, with 2^-46 |c_k|^2 to spare for what comes last, where
//
//     E_k = A length_k + B error_k,   A >= |rho - rho^| + (g + 64 u) |rho^|,   B >= (1 + g) |rho^|,
//     slack_k >= (g + (D + 96) u) |d_k|^2 / 2 + D 2^-120 + 2^-46 |c_k|^2,
//
// and A and B also carry sqrt(D) 2^-60. The excess of 64 u pays for what is rounded after that: E_k itself, a_k + E_k,
// a_k - E_k - 2 slack_k and the comparison (each within a few u of |a_k| + E_k <= (|rho^| |d^_k| + |d_k|^2 / 2)(1 +
// ...)); (D + 32) u is what the float32 sum behind start_k may err by; the powers of two pay for products and squares
// that underflow or are flushed to zero.
//
// The defined score is not t but its double-precision form, whose two tree sums of depth p err by at most
// (p + 2) 2^-53 (|r| + |c_k|)^2 <= (p + 2) 2^-52 (|r|^2 + |c_k|^2); a codeword may win with a t that is smaller by as
// much. The last term of the slack and margin >= 2^-45 |r|^2 cover it (p <= 62), so that
//
//     a_k + E_k  >=  t_k + its part of that error,      a_j - E_j - 2 slack_j  <=  t_j - its part,
//
// the winner satisfies a_k + E_k >= max_j (a_j - E_j - 2 slack_j) - margin, and a codeword outside this window can
// neither win nor tie. What is inside is scored in double, in the defined order.
//
// The slack is a further 1 + (D + 32) u times as large, which pays for g slack_k on the right-hand side as long as D u
// is at most 1/4, D at most kMostScreened.
//
// A panel of codewords is first compared against its largest length and error, then codeword by codeword. Rows and
// codebooks longer than 1e18, whose products could overflow, are scored exhaustively, and so are wider ones.
//
// The Gram form encodes all levels of a shared codebook by one product: with q the codewords chosen so far,
// (x - q - m).d_k = (x - m).d_k - sum_j H[j, k], where H[j, k] ~ c_j.d_k is computed once, as above with rho = c_j and
// start = 0. After l levels the left-hand side of the bound has grown by the errors of l rows of H, the rounding of l
// differences, each within u (|r| + |m|) |d_k| + u |d_k|^2 / 2 + E_k, and the rounding u |r| of each step of the
// residual recursion: A and B of the codewords, and 16 u (|r| + |m|) a level, are added to A and B; 64 u covers the
// |d_k|^2.
#pragma once

#include <cstdint>

#include "longcat/packed_codebook.h"

namespace longcat {

constexpr float kLowest = -1e38f;                    // below every score that is screened
constexpr double kLongest = 1e18;                    // beyond it float32 products could overflow
constexpr int64_t kMostScreened = int64_t(1) << 22;  // elements of a row, of which float32 sums still say something
constexpr int kMostRows = 12;                        // of a tile, at most
constexpr int64_t kNoRuns = int64_t(1) << 40;
constexpr int kMostCandidates = 32;  // held for a row before they are resolved

// What the bound takes from a row: A, B and margin above.
struct RowBounds {
    float by_length, by_error, margin;
    bool finite, exhaustive;
};

// What the screen has found for one row: codewords in the order of their index.
struct Candidates {
    int count;
    int64_t best;  // the nearest of those already scored in double; -1 where none is
    double score;  // its score
    int64_t word[kMostCandidates];
    float high[kMostCandidates];  // a + E
};

// A tile of rows: what the screen compares with, a lane a row, and what it finds. Lanes whose bound is infinite find
// nothing.
struct Tile {
    alignas(64) float bound[16];  // largest a - E - 2 slack so far, less the margin
    alignas(64) float by_length[16];
    alignas(64) float by_error[16];
    float margin[kMostRows];
    bool finite[kMostRows], exhaustive[kMostRows];
    const float* row[kMostRows];  // null: left out
    Candidates found[kMostRows];
};

// Where a screen works: a part of a codebook, packed, and what exact scores need.
struct Part {
    const PackedCodebook& packed;
    const Codebook& book;  // the whole
    int64_t offset;        // of the part's first entry
    double* terms;         // `tree_terms(dim)` doubles
};

// The functions of one instruction set.
struct RvqKernels {
    int tile_rows, panel_words, step;  // step: elements of a row in four bytes
    int64_t run;                       // products summed in one go

    // Sum of a_d b_d in double: halves are folded onto each other, from a power of two that zeros fill up.
    double (*tree_dot)(const float* a, const float* b, int64_t dim, double* terms);

    // row -= word, sum += word, element by element.
    void (*take_off)(float* row, float* sum, const float* word, int64_t dim);

    // Rounds r - m to the element type, zero-padded to whole steps.
    RowBounds (*prepare_row)(const float* row, const float* centre, int64_t dim, uint32_t* out);

    // Describes codeword k and rounds it to `units`; zeros where it is unusable or past the end.
    void (*pack_word)(const Codebook& book, const PackedCodebook& packed, int64_t k, uint32_t* units, double* terms);

    // Lays the words of a panel, `pitch` units apart, unit by unit.
    void (*lay_panel)(const PackedCodebook& packed, int64_t first, const uint32_t* units, int64_t pitch);

    // Screens tiles of prepared rows, `stride` units apart, against all panels of a part.
    void (*screen)(const Part& part, const uint32_t* rows, int64_t stride, int64_t tiles, Tile* states);

    // start_k + rho^.d^_k of tiles of prepared rows: out[i * pitch + k].
    void (*scores)(const PackedCodebook& packed, const float* start, const uint32_t* rows, int64_t stride,
                   int64_t tiles, float* out, int64_t pitch);

    // Screens lane `lane` by its scores, from which `products` are subtracted first where they are given. Sends for
    // `next`, which the row after it reads, on the way, unless it is null: all at once would stall.
    void (*screen_scores)(const Part& part, float* scores, const float* products, Tile& state, int lane,
                          const float* next);
};

const RvqKernels& rvq_kernels(Isa isa);

// Scores the candidates in double and keeps the best.
void resolve(Candidates& found, float bound, const RvqKernels& kernels, const Part& part, const float* row);

// Scores every usable codeword of the part in double and keeps the best.
void resolve_all(Candidates& found, const RvqKernels& kernels, const Part& part, const float* row);

// What the bound takes from codeword j as a row of the Gram form.
RowBounds word_bounds(const PackedCodebook& packed, int64_t j);

// Drops the candidates that the bound has left behind; gives how many remain.
int drop_losers(Candidates& found, float bound);

}  // namespace longcat
