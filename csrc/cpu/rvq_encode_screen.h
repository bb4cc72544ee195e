// The inner loops of rvq_encode for one instruction set. Included once for each, inside its namespace and target, after
// `Lanes` (kWidth floats with load, splat, fused or plain multiply-add, subtract, store, and a comparison to bits) and
// kTileRows. No include guard: see rvq_encode.cpp.

constexpr int kPanelWords = 2 * Lanes::kWidth;

// Dot products of one tile of rows with one panel of codewords.
static inline void tile_dots(const float* __restrict tile, const float* __restrict panel, int64_t dim,
                             Lanes (&dots)[kTileRows][2]) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) dots[i][0] = dots[i][1] = Lanes::splat(0.0f);
    for (int64_t d = 0; d < dim; ++d) {
        const Lanes low = Lanes::load(panel + d * kPanelWords),
                    high = Lanes::load(panel + d * kPanelWords + Lanes::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
            const Lanes x = Lanes::splat(tile[d * kTileRows + i]);
            dots[i][0] = Lanes::multiply_add(low, x, dots[i][0]);
            dots[i][1] = Lanes::multiply_add(high, x, dots[i][1]);
        }
    }
}

// Screens a block of `tiles` packed tiles against the whole codebook; fills the candidates of each row.
static void screen(const PackedCodebook& book, const float* tiles, int64_t count, RowState* rows) {
    const Lanes minus_two = Lanes::splat(-2.0f);
    for (int64_t first = 0; first < book.padded; first += kPanelWords) {
        const float* panel = book.words.data() + first * book.dim;
        for (int64_t tile = 0; tile < count; ++tile) {
            Lanes dots[kTileRows][2];
            tile_dots(tiles + tile * kTileRows * book.dim, panel, book.dim, dots);
#pragma GCC unroll 16
            for (int i = 0; i < kTileRows; ++i) {
                RowState& row = rows[tile * kTileRows + i];
                const Lanes slope = Lanes::splat(row.slope), bound = Lanes::splat(row.bound);
                uint32_t maybe = 0;
                alignas(64) float low[kPanelWords];
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    const int64_t at = first + h * Lanes::kWidth;
                    const Lanes error = Lanes::multiply(slope, Lanes::load(book.length.data() + at));
                    const Lanes score =
                        Lanes::multiply_add(dots[i][h], minus_two, Lanes::load(book.norm_low.data() + at));
                    const Lanes least = Lanes::subtract(score, error);
                    maybe |= Lanes::not_above(least, bound) << (h * Lanes::kWidth);
                    least.store(low + h * Lanes::kWidth);
                }
                if (__builtin_expect(maybe != 0, 0)) {
                    alignas(64) float dot[kPanelWords];
                    dots[i][0].store(dot);
                    dots[i][1].store(dot + Lanes::kWidth);
                    row.consider(book, first, maybe, dot, low);
                }
            }
        }
    }
}
