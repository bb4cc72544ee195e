// Tiles of products, and what they do beside: a part of gemm_kernels_body.h, included there. No include guard.

// Prefetches, spread out evenly: a burst of requests would hold up the loads behind it.
struct Asking {
    const Ahead& ahead;
    int64_t share, asked = 0;
    Asking(const Ahead& ahead, const uint32_t*, int64_t units)
        : ahead(ahead), share((ahead.count << 16) / std::max<int64_t>(units, 1)) {}

    inline __attribute__((always_inline)) void at(const uint32_t*) {
        __builtin_prefetch(ahead.from + (asked >> 16) * ahead.step, 0, 2);
        asked += share;
    }
};

// Transposes a little at a time: the ports of products are not those of shuffles and stores.
struct Packing {
    const Pieces& pieces;
    int64_t piece;
    const uint32_t* due;
    Packing(const Pieces& pieces, const uint32_t* panel, int64_t)
        : pieces(pieces), piece(pieces.first), due(pieces.first == pieces.last ? nullptr : panel) {}

    inline __attribute__((always_inline)) void at(const uint32_t* panel) {
        if (panel != due) return;
        pack();
        due = ++piece == pieces.last ? nullptr : panel + pieces.every * kPanelColumns;
    }

    inline __attribute__((always_inline)) void pack() const {
        constexpr int kLines = kWidth / 4;  // of the caches: as many bytes as a piece has
        const int64_t half = piece & 1, four = piece >> 1;
        const char* after = pieces.after[half] + (four & 3) * kLines * pieces.stride + (four >> 2) * 64;
#pragma GCC unroll 4
        for (int c = 0; c < kLines; ++c) __builtin_prefetch(after + c * pieces.stride, 0, 2);
        Lanes units[4];
        load_piece(pieces.lines[half] + four * 16, pieces.stride, units);
        uint32_t* out = pieces.panel + four * 4 * kPanelColumns + half * kWidth;
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) units[u].store_units(out + u * kPanelColumns);
    }
};

template <int kRows, bool kByDepth, class Errand, class Its>
static void product_tile(const uint32_t* rows, int64_t pitch, const uint32_t* panel, int64_t units, const Its& its,
                         float* out, int64_t out_pitch, bool add) {
    Lanes sums[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = Lanes::splat(0);
    if (add) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            sums[i][0] = Lanes::load(out + i * out_pitch);
            sums[i][1] = Lanes::load(out + i * out_pitch + kWidth);
        }
    }
    // Three rows a pointer: more pointers than that do not fit the registers.
    constexpr int kPointers = kByDepth ? 1 : (kRows + 2) / 3;
    const uint32_t* at[kPointers];
#pragma GCC unroll 4
    for (int group = 0; group < kPointers; ++group) at[group] = rows + 3 * group * pitch;
    const uint32_t* end = panel + units * kPanelColumns;
    Errand errand(its, panel, units);
    for (; panel != end; panel += kPanelColumns) {
        errand.at(panel);
        const Lanes columns[2] = {Lanes::load_units(panel), Lanes::load_units(panel + kWidth)};
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const Lanes x = Lanes::splat_unit(kByDepth ? at[0] + i : at[i / 3] + (i % 3) * pitch);
            sums[i][0] = Lanes::multiply_add(x, columns[0], sums[i][0]);
            sums[i][1] = Lanes::multiply_add(x, columns[1], sums[i][1]);
        }
#pragma GCC unroll 4
        for (int group = 0; group < kPointers; ++group) at[group] += kByDepth ? pitch : 1;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        sums[i][0].store(out + i * out_pitch);
        sums[i][1].store(out + i * out_pitch + kWidth);
    }
}

template <class Its>
using ProductTile = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, const Its&, float*, int64_t, bool);

template <bool kByDepth, class Errand, class Its, int... kLess>
static ProductTile<Its> product_tile_of(int rows, std::integer_sequence<int, kLess...>) {
    static constexpr ProductTile<Its> tiles[] = {product_tile<kLess + 1, kByDepth, Errand, Its>...};
    return tiles[rows - 1];
}

constexpr auto kTileCounts = std::make_integer_sequence<int, kTileRows>{};

static void product(const TileRows& rows, const uint32_t* panel, int64_t units, const Ahead& ahead, float* out,
                    int64_t pitch, bool add) {
    const auto tile = rows.by_depth ? product_tile_of<true, Asking, Ahead>(rows.count, kTileCounts)  //
                                    : product_tile_of<false, Asking, Ahead>(rows.count, kTileCounts);
    tile(rows.units, rows.pitch, panel, units, ahead, out, pitch, add);
}

static void packing_product(const TileRows& rows, const uint32_t* panel, int64_t units, const Pieces& pieces,
                            float* out, int64_t pitch, bool add) {
    const auto tile = product_tile_of<false, Packing, Pieces>(rows.count, kTileCounts);
    tile(rows.units, rows.pitch, panel, units, pieces, out, pitch, add);
}
