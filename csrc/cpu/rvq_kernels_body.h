// rvq_kernels.h for one instruction set. Included once for each, inside its namespace and target, after `Lanes` (kWidth
// floats), `kTileRows`, and `kStep`, the elements of a row in four bytes. No include guard: see rvq_kernels.cpp.

constexpr int kPanelWords = 2 * Lanes::kWidth;
// Products summed in one go, or all: short runs make the bound of float32 narrow, that of bfloat16 is wider anyway.
constexpr int64_t kRun = kStep > 1 ? kNoRuns : 128;

// Of kCount products that lie `part` apart, the kPart-th and those kHalf, 2 kHalf, ... after it, in the order in which
// eight parts are folded onto each other; with kSquare, b is a. Recursive, since a loop here would be vectorized
// itself.
template <int kCount, bool kSquare, int kHalf, int kPart>
static inline __attribute__((always_inline)) double folded(const float* a, const float* b, int64_t part) {
    if constexpr (kHalf == 8) {
        const double x = double(a[kPart * part]), y = kSquare ? x : double(b[kPart * part]);
        return x * y;
    } else {
        const double sum = folded<kCount, kSquare, 2 * kHalf, kPart>(a, b, part);
        if constexpr (kPart + kHalf < kCount)
            return sum + folded<kCount, kSquare, 2 * kHalf, kPart + kHalf>(a, b, part);
        return sum;
    }
}

// Terms [first, last) of an eighth of the sum, where the first kCount parts have them.
template <int kCount>
static void fold_range(const float* a, const float* b, int64_t part, int64_t first, int64_t last, double* terms) {
    if (a == b)
        for (int64_t d = first; d < last; ++d) terms[d] = folded<kCount, true, 1, 0>(a + d, b + d, part);
    else
        for (int64_t d = first; d < last; ++d) terms[d] = folded<kCount, false, 1, 0>(a + d, b + d, part);
}

static void fold_parts(const float* a, const float* b, int64_t part, int64_t count, int64_t first, int64_t last,
                       double* terms) {
    if (count == 8) fold_range<8>(a, b, part, first, last, terms);
    if (count == 7) fold_range<7>(a, b, part, first, last, terms);
    if (count == 6) fold_range<6>(a, b, part, first, last, terms);
    if (count == 5) fold_range<5>(a, b, part, first, last, terms);
    if (count == 4) fold_range<4>(a, b, part, first, last, terms);
    if (count == 3) fold_range<3>(a, b, part, first, last, terms);
    if (count == 2) fold_range<2>(a, b, part, first, last, terms);
    if (count == 1) fold_range<1>(a, b, part, first, last, terms);
    if (count == 0) std::fill(terms + first, terms + last, 0.0);
}

static double tree_dot(const float* a, const float* b, int64_t dim, double* terms) {
    int bits = 3;
    while (int64_t(1) << bits < dim) ++bits;
    // Three folds in one pass: parts that are missing are zero, and adding zero changes nothing.
    bits -= 3;
    int64_t width = int64_t(1) << bits;
    const int64_t whole = dim >> bits, rest = dim & (width - 1);
    if (rest > 0) fold_parts(a, b, width, whole + 1, 0, rest, terms);
    fold_parts(a, b, width, whole, rest, width, terms);
    while (width > 8) {
        width /= 2;
        for (int64_t d = 0; d < width; ++d) terms[d] += terms[width + d];
    }
    // The last folds, without a loop: scores of short rows are little else.
    if (width == 8)
        return ((terms[0] + terms[4]) + (terms[2] + terms[6])) + ((terms[1] + terms[5]) + (terms[3] + terms[7]));
    if (width == 4) return (terms[0] + terms[2]) + (terms[1] + terms[3]);
    return width == 2 ? terms[0] + terms[1] : terms[0];
}

static void take_off(float* __restrict row, float* __restrict sum, const float* __restrict word, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) {
        row[d] -= word[d];
        sum[d] += word[d];
    }
}

// Float32 sums over the values v of a row or codeword, in lanes: of the squares of v, of v - m, of the element that
// this is rounded to, and of what the rounding loses; NaN in `zero` once a value is not finite.
struct Sums {
    Lanes all, whole, kept, lost, zero;
    Sums() : all(Lanes::splat(0)), whole(all), kept(all), lost(all), zero(all) {}
};

// Rounds kWidth values less the centre to elements.
static inline void round_lanes(const float* values, const float* centre, uint32_t* out, Sums& sums) {
    const Lanes value = Lanes::load(values), centred = Lanes::subtract(value, Lanes::load(centre)),
                element = Lanes::to_elements(centred, out), lost = Lanes::subtract(centred, element);
    sums.zero = Lanes::add(sums.zero, Lanes::multiply(value, Lanes::splat(0)));
    sums.all = Lanes::add(sums.all, Lanes::multiply(value, value));
    sums.whole = Lanes::add(sums.whole, Lanes::multiply(centred, centred));
    sums.kept = Lanes::add(sums.kept, Lanes::multiply(element, element));
    sums.lost = Lanes::add(sums.lost, Lanes::multiply(lost, lost));
}

// Rounds `count` values; the last lanes may be filled up with zeros, which count for nothing.
static inline void round_values(const float* values, const float* centre, int64_t count, uint32_t* out, Sums& sums) {
    constexpr int kWidth = Lanes::kWidth;
    int64_t d = 0;
    for (; d + kWidth <= count; d += kWidth) round_lanes(values + d, centre + d, out + d / kStep, sums);
    if (d == count) return;
    float tail[kWidth] = {}, tail_centre[kWidth] = {};
    uint32_t elements[kWidth];
    std::copy(values + d, values + count, tail);
    std::copy(centre + d, centre + count, tail_centre);
    round_lanes(tail, tail_centre, elements, sums);
    std::copy(elements, elements + (count - d + kStep - 1) / kStep, out + d / kStep);
}

static RowBounds prepare_row(const float* row, const float* centre, int64_t dim, uint32_t* out) {
    Sums sums;
    round_values(row, centre, dim, out, sums);
    RowBounds bounds =
        row_bounds(double(sums.all.total()), double(sums.kept.total()), double(sums.lost.total()), dim, kRun);
    bounds.finite = double(sums.zero.total()) == 0;
    if (!bounds.finite || bounds.exhaustive) std::fill(out, out + (dim + kStep - 1) / kStep, 0u);
    return bounds;
}

// Four words' units, laid unit by unit.
static inline void transpose4(const uint32_t* a, const uint32_t* b, const uint32_t* c, const uint32_t* d,
                              uint32_t* out) {
    typedef uint32_t Four __attribute__((vector_size(16), aligned(4)));
    const Four va = *reinterpret_cast<const Four*>(a), vb = *reinterpret_cast<const Four*>(b),
               vc = *reinterpret_cast<const Four*>(c), vd = *reinterpret_cast<const Four*>(d);
    const Four ab = LC_SHUFFLE(Four, va, vb, 0, 4, 1, 5), cd = LC_SHUFFLE(Four, vc, vd, 0, 4, 1, 5);
    const Four ab_high = LC_SHUFFLE(Four, va, vb, 2, 6, 3, 7), cd_high = LC_SHUFFLE(Four, vc, vd, 2, 6, 3, 7);
    *reinterpret_cast<Four*>(out) = LC_SHUFFLE(Four, ab, cd, 0, 1, 4, 5);
    *reinterpret_cast<Four*>(out + kPanelWords) = LC_SHUFFLE(Four, ab, cd, 2, 3, 6, 7);
    *reinterpret_cast<Four*>(out + 2 * kPanelWords) = LC_SHUFFLE(Four, ab_high, cd_high, 0, 1, 4, 5);
    *reinterpret_cast<Four*>(out + 3 * kPanelWords) = LC_SHUFFLE(Four, ab_high, cd_high, 2, 3, 6, 7);
}

static void pack_word(const Codebook& book, const PackedCodebook& packed, int64_t k, uint32_t* units, double* terms) {
    const float* word = k < packed.entries ? book.words + k * book.stride : nullptr;
    packed.norm[k] = word == nullptr ? double(kInfinity) : tree_dot(word, word, packed.dim, terms);
    Sums sums;
    if (std::isfinite(packed.norm[k])) {
        round_values(word, packed.centre, packed.dim, units, sums);
    } else {
        packed.norm[k] = double(kInfinity);
        std::fill(units, units + (packed.dim + kStep - 1) / kStep, 0u);
    }
    describe_word(packed, k, double(sums.whole.total()), double(sums.lost.total()), kRun);
}

static void lay_panel(const PackedCodebook& packed, int64_t first, const uint32_t* units, int64_t pitch) {
    const int64_t count = (packed.dim + kStep - 1) / kStep;
    uint32_t* out = packed.panels + first * count;
    int64_t unit = 0;
    for (; unit + 4 <= count; unit += 4)  // four a time, so that loads and stores fill vectors
        for (int w = 0; w < kPanelWords; w += 4) {
            const uint32_t* at = units + w * pitch + unit;
            transpose4(at, at + pitch, at + 2 * pitch, at + 3 * pitch, out + unit * kPanelWords + w);
        }
    for (; unit < count; ++unit)
        for (int w = 0; w < kPanelWords; ++w) out[unit * kPanelWords + w] = units[w * pitch + unit];
    packed.panel_length[first / kPanelWords] =
        *std::max_element(packed.length + first, packed.length + first + kPanelWords);
    packed.panel_error[first / kPanelWords] =
        *std::max_element(packed.error + first, packed.error + first + kPanelWords);
}

static inline __attribute__((always_inline)) void store_tile(const Lanes (&scores)[kTileRows][2], float* out,
                                                             int64_t pitch) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
        scores[i][0].store(out + i * pitch);
        scores[i][1].store(out + i * pitch + Lanes::kWidth);
    }
}

static inline __attribute__((always_inline)) void add_tile(const float* sums, Lanes (&scores)[kTileRows][2]) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
        scores[i][0] = Lanes::add(Lanes::load(sums + i * kPanelWords), scores[i][0]);
        scores[i][1] = Lanes::add(Lanes::load(sums + i * kPanelWords + Lanes::kWidth), scores[i][1]);
    }
}

// Adds the products of `count` units of a tile's rows and of a panel to the scores.
static inline __attribute__((always_inline)) void add_products(const uint32_t* panel, const uint32_t* rows,
                                                               int64_t stride, int64_t count,
                                                               Lanes (&scores)[kTileRows][2]) {
    const uint32_t* end = panel + count * kPanelWords;
    // Three rows a pointer: more pointers than that do not fit the registers.
    const uint32_t* at[kTileRows / 3];
#pragma GCC unroll 4
    for (int group = 0; group < kTileRows / 3; ++group) at[group] = rows + 3 * group * stride;
    for (; panel != end; panel += kPanelWords) {
        const Lanes words[2] = {Lanes::load_units(panel), Lanes::load_units(panel + Lanes::kWidth)};
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
            const Lanes x = Lanes::splat_unit(at[i / 3] + (i % 3) * stride);
            scores[i][0] = Lanes::multiply_add(words[0], x, scores[i][0]);
            scores[i][1] = Lanes::multiply_add(words[1], x, scores[i][1]);
        }
#pragma GCC unroll 4
        for (int group = 0; group < kTileRows / 3; ++group) ++at[group];
    }
}

// Scores of one tile of rows against the panel that begins at codeword `first`, run by run.
static inline __attribute__((always_inline)) void tile_scores(const PackedCodebook& packed, const float* start,
                                                              int64_t first, const uint32_t* rows, int64_t stride,
                                                              Lanes (&scores)[kTileRows][2]) {
    const Lanes low = Lanes::load(start + first), high = Lanes::load(start + first + Lanes::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) scores[i][0] = low, scores[i][1] = high;
    const int64_t units = (packed.dim + kStep - 1) / kStep;
    const uint32_t* panel = packed.panels + first * units;
    if constexpr (kStep > 1) {
        add_products(panel, rows, stride, units, scores);
    } else {
        alignas(64) float sums[kTileRows * kPanelWords];
        int64_t done = 0;
        for (; units - done > kRun; done += kRun) {
            add_products(panel + done * kPanelWords, rows + done, stride, kRun, scores);
            if (done > 0) add_tile(sums, scores);
            store_tile(scores, sums, kPanelWords);
#pragma GCC unroll 16
            for (int i = 0; i < kTileRows; ++i) scores[i][0] = scores[i][1] = Lanes::splat(0);
        }
        add_products(panel + done * kPanelWords, rows + done, stride, units - done, scores);
        if (done > 0) add_tile(sums, scores);
    }
}

// Takes the candidates of one row among the words of a panel, by their own lengths and errors.
static inline void take(const Part& part, int64_t first, const float* scores, Tile& state, int lane) {
    const PackedCodebook& packed = part.packed;
    const Lanes by_length = Lanes::splat(state.by_length[lane]), by_error = Lanes::splat(state.by_error[lane]);
    alignas(64) float high[kPanelWords];
    Lanes most = Lanes::splat(kLowest);
#pragma GCC unroll 2
    for (int h = 0; h < kPanelWords; h += Lanes::kWidth) {
        const int64_t at = first + h;
        const Lanes score = Lanes::load(scores + h), length = Lanes::load(packed.length + at);
        const Lanes e =
            Lanes::add(Lanes::multiply(by_length, length), Lanes::multiply(by_error, Lanes::load(packed.error + at)));
        const Lanes slack = Lanes::load(packed.slack + at);
        most = Lanes::larger(most, Lanes::subtract(Lanes::subtract(score, e), Lanes::add(slack, slack)));
        Lanes::add(score, e).store(high + h);
    }
    state.bound[lane] = std::max(state.bound[lane], most.largest() - state.margin[lane]);
    const Lanes bound = Lanes::splat(state.bound[lane]);
    uint32_t maybe = 0;
#pragma GCC unroll 2
    for (int h = 0; h < kPanelWords; h += Lanes::kWidth) maybe |= Lanes::not_below(Lanes::load(high + h), bound) << h;
    Candidates& found = state.found[lane];
    for (; maybe != 0; maybe &= maybe - 1) {
        const int j = __builtin_ctz(maybe);
        if (found.count == kMostCandidates && drop_losers(found, state.bound[lane]) == kMostCandidates)
            resolve(found, state.bound[lane], kKernels, part, state.row[lane]);
        found.word[found.count] = part.offset + first + j;
        found.high[found.count++] = high[j];
    }
}

// What a score must reach in a panel of this length and error.
static inline void thresholds(const Tile& state, float length, float error, float* out) {
    const Lanes by = Lanes::splat(length), rough = Lanes::splat(error);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; i += Lanes::kWidth) {
        const Lanes e = Lanes::add(Lanes::multiply(Lanes::load(state.by_length + i), by),
                                   Lanes::multiply(Lanes::load(state.by_error + i), rough));
        Lanes::subtract(Lanes::load(state.bound + i), e).store(out + i);
    }
}

static __attribute__((noinline)) void take_tile(const Part& part, int64_t first, const float* scores,
                                                const float* threshold, Tile& state) {
    for (int i = 0; i < kTileRows; ++i) {
        const float* row = scores + i * kPanelWords;
        const Lanes best = Lanes::larger(Lanes::load(row), Lanes::load(row + Lanes::kWidth));
        if (Lanes::not_below(best, Lanes::splat(threshold[i])) != 0) take(part, first, row, state, i);
    }
}

static void screen(const Part& part, const uint32_t* rows, int64_t stride, int64_t tiles, Tile* states) {
    const PackedCodebook& packed = part.packed;
    for (int64_t first = 0; first < packed.padded; first += kPanelWords) {
        const float length = packed.panel_length[first / kPanelWords], error = packed.panel_error[first / kPanelWords];
        for (int64_t tile = 0; tile < tiles; ++tile) {
            Lanes scores[kTileRows][2];
            tile_scores(packed, packed.start, first, rows + tile * kTileRows * stride, stride, scores);
            alignas(64) float threshold[16];
            thresholds(states[tile], length, error, threshold);
            uint32_t reached = 0;
#pragma GCC unroll 16
            for (int i = 0; i < kTileRows; ++i)
                reached |= Lanes::not_below(Lanes::larger(scores[i][0], scores[i][1]), Lanes::splat(threshold[i]));
            if (reached == 0) continue;
            alignas(64) float stored[kTileRows * kPanelWords];
            store_tile(scores, stored, kPanelWords);
            take_tile(part, first, stored, threshold, states[tile]);
        }
    }
}

static void scores(const PackedCodebook& packed, const float* start, const uint32_t* rows, int64_t stride,
                   int64_t tiles, float* out, int64_t pitch) {
    for (int64_t first = 0; first < packed.padded; first += kPanelWords) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            Lanes scores[kTileRows][2];
            tile_scores(packed, start, first, rows + tile * kTileRows * stride, stride, scores);
            store_tile(scores, out + tile * kTileRows * pitch + first, pitch);
        }
    }
}

template <bool kSubtract>
static void screen_row(const Part& part, float* scores, const float* products, Tile& state, int lane,
                       const float* next) {
    const int64_t padded = part.packed.padded;
    const float *length = part.packed.panel_length, *error = part.packed.panel_error;
    for (int64_t first = 0; first < padded; first += kPanelWords, ++length, ++error) {
        Lanes low = Lanes::load(scores + first), high = Lanes::load(scores + first + Lanes::kWidth);
        if constexpr (kSubtract) {
            low = Lanes::subtract(low, Lanes::load(products + first));
            high = Lanes::subtract(high, Lanes::load(products + first + Lanes::kWidth));
            low.store(scores + first);
            high.store(scores + first + Lanes::kWidth);
        }
        if (next != nullptr)
#pragma GCC unroll 2
            for (int h = 0; h < kPanelWords; h += 16) __builtin_prefetch(next + first + h, 0, 2);
        const float e = state.by_length[lane] * *length + state.by_error[lane] * *error;
        const Lanes threshold = Lanes::splat(state.bound[lane] - e);
        if (Lanes::not_below(Lanes::larger(low, high), threshold) != 0) take(part, first, scores + first, state, lane);
    }
}

static void screen_scores(const Part& part, float* scores, const float* products, Tile& state, int lane,
                          const float* next) {
    if (products == nullptr)
        screen_row<false>(part, scores, products, state, lane, next);
    else
        screen_row<true>(part, scores, products, state, lane, next);
}

const RvqKernels kKernels = {kTileRows,   kPanelWords, kStep,     kRun,   tree_dot, take_off,
                             prepare_row, pack_word,   lay_panel, screen, scores,   screen_scores};
