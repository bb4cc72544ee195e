// The products of ngram_embedding_weight_grad for one instruction set. Included once for each, inside its namespace and
// target, after `Floats` and `Halves`. A unit is what a lane multiplies: one element, or a pair of two adjacent terms.
// No include guard.

// c[r][j] += sum over k of a[k][r] b[k][j], for one tile of `steps` units; `columns` of c are wanted.
template <class Lanes, bool kIsWhole>
static void outer(const uint32_t* a, const typename Lanes::Element* b, int64_t b_stride, int64_t terms, int columns,
                  float* c, int64_t c_stride) {
    constexpr int kRows = Lanes::kRows, kTerms = Lanes::kTerms;
    typename Lanes::Sum low[kRows], high[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) low[r] = high[r] = Lanes::zero();
    for (int64_t k = 0; k < terms; k += kTerms, a += kRows) {
        typename Lanes::Values first, second;
        const auto* next = k + 1 < terms ? b + b_stride : b;  // the unit's other half is zero
        if (kIsWhole)
            Lanes::load(b, next, first, second);
        else
            Lanes::load_some(b, next, columns, first, second);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const auto unit = Lanes::splat(a + r);
            low[r] = Lanes::multiply_add(unit, first, low[r]);
            high[r] = Lanes::multiply_add(unit, second, high[r]);
        }
        b += kTerms * b_stride;
    }
    for (int r = 0; r < kRows; ++r) {
        float sums[2 * Lanes::kWidth];
        Lanes::store(low[r], high[r], sums);
        for (int j = 0; j < columns; ++j) c[r * c_stride + j] += sums[j];
    }
}

// c [tiles * kRows, width] = a^T b: a as `pack_tile` leaves it, tile by tile, b [terms, width].
template <class Lanes>
static void product(const uint32_t* a, int64_t tiles, int64_t terms, const typename Lanes::Element* b, int64_t b_stride,
                    int64_t width, float* c) {
    constexpr int kColumns = 2 * Lanes::kWidth;
    const int64_t tile_units = round_up(terms, kPadding) / Lanes::kTerms * Lanes::kRows;
    std::fill(c, c + tiles * Lanes::kRows * width, 0.0f);
    for (int64_t k = 0; k < terms; k += kBlockTerms)
        for (int64_t j = 0; j < width; j += kColumns)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const uint32_t* units = a + tile * tile_units + k / Lanes::kTerms * Lanes::kRows;
                const auto* rows = b + k * b_stride + j;
                const int64_t count = std::min(kBlockTerms, terms - k);
                float* sums = c + tile * Lanes::kRows * width + j;
                const int columns = int(std::min<int64_t>(kColumns, width - j));
                if (columns == kColumns)
                    outer<Lanes, true>(units, rows, b_stride, count, columns, sums, width);
                else
                    outer<Lanes, false>(units, rows, b_stride, count, columns, sums, width);
            }
}

// Lays terms [0, terms) of kRows rows unit by unit; `at(row, term)` reads one, rows from `rows` on are zero.
template <class Lanes, class Read>
static inline void pack_tile(int64_t rows, int64_t terms, const Read& at, uint32_t* out) {
    constexpr int kRows = Lanes::kRows, kTerms = Lanes::kTerms;
    int64_t k = 0;
    if (rows == kRows)
        for (; k + kTerms <= terms; k += kTerms, out += kRows)
#pragma GCC unroll 16
            for (int64_t r = 0; r < kRows; ++r) out[r] = Lanes::unit(at(r, k), at(r, k + kTerms - 1));
    for (; k < terms; k += kTerms, out += kRows)
        for (int64_t r = 0; r < kRows; ++r) {
            const auto zero = typename Lanes::Element{};
            const auto last = r < rows && k + kTerms <= terms ? at(r, k + kTerms - 1) : zero;
            out[r] = Lanes::unit(r < rows ? at(r, k) : zero, last);
        }
}

template <class Lanes>
static void pack_tokens(const NgramEmbeddingWeightGrad& p, const int64_t* live, int64_t rows, uint32_t* out) {
    using Element = typename Lanes::Element;
    const Element* tokens[Lanes::kRows];
    for (int64_t r = 0; r < rows; ++r) tokens[r] = static_cast<const Element*>(p.grad.data) + live[r] * p.grad.stride;
    pack_tile<Lanes>(rows, p.grad.width, [&](int64_t r, int64_t k) { return tokens[r][k]; }, out);
}

template <class Lanes>
static void pack_columns(const NgramEmbeddingWeightGrad& p, const int64_t* live, int64_t count, int64_t column,
                         uint32_t* out) {
    const auto* grad = static_cast<const typename Lanes::Element*>(p.grad.data) + column;
    const auto at = [&](int64_t r, int64_t k) { return grad[live[k] * p.grad.stride + r]; };
    pack_tile<Lanes>(std::min<int64_t>(Lanes::kRows, p.grad.width - column), count, at, out);
}

template <class T>
static void round_row(const float* sums, int64_t count, float scale, void* row) {
    T* __restrict out = static_cast<T*>(row);
    for (int64_t d = 0; d < count; ++d) out[d] = from_float<T>(sums[d] * scale);
}

template <class T>
static void add_row(const void* row, int64_t count, float* __restrict sums) {
    const T* __restrict terms = static_cast<const T*>(row);
    for (int64_t d = 0; d < count; ++d) sums[d] += to_float(terms[d]);
}

template <class Lanes>
constexpr Kernels<typename Lanes::Element> kernels() {
    using T = typename Lanes::Element;
    return {Lanes::kRows,        Lanes::kTerms, product<Lanes>, pack_tokens<Lanes>,
            pack_columns<Lanes>, round_row<T>,  add_row<T>,     add_row<float>};
}
constexpr Kernels<float> kFloats = kernels<Floats>();
constexpr Kernels<BFloat16> kHalves = kernels<Halves>();
