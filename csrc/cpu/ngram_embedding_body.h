// The products of ngram_embedding for one instruction set. Included once for each, inside its namespace and target,
// after `Floats` and `Halves`: kStep elements at a time of float32 and bfloat16 rows. No include guard.

template <class Lanes, int kRows, int kColumns>
using Sums = typename Lanes::Sum[kRows][kColumns];

// Adds the products of one step, of which b has `count` elements.
template <class Lanes, int kRows, int kColumns, bool kIsWhole>
static inline void add_products(const typename Lanes::Element* a, int64_t a_stride, const typename Lanes::Element* b,
                                int64_t b_stride, int count, Sums<Lanes, kRows, kColumns>& sums) {
    typename Lanes::Values right[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
        right[j] = kIsWhole ? Lanes::load(b + j * b_stride) : Lanes::load_some(b + j * b_stride, count);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const auto left = Lanes::load(a + r * a_stride);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) sums[r][j] = Lanes::multiply_add(left, right[j], sums[r][j]);
    }
}

// Adds to `c` the products of kRows rows of a and kColumns rows of b over one chunk of tables.
template <class Lanes, int kRows, int kColumns>
static void tile(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a, int64_t a_stride,
                 int64_t column, float* c, int64_t c_stride) {
    constexpr int kStep = Lanes::kStep;
    Sums<Lanes, kRows, kColumns> sums;
#pragma GCC unroll 8
    for (auto& row : sums)
#pragma GCC unroll 8
        for (auto& sum : row) sum = Lanes::zero();
    for (int64_t i = chunk.first; i < chunk.end; ++i) {
        const auto& weights = p.tables[size_t(i)].projection;
        const int64_t b_stride = weights.stride, width = weights.width;
        const auto* b = static_cast<const typename Lanes::Element*>(weights.data) + column * b_stride;
        int64_t k = 0;
        for (; k + kStep <= width; k += kStep)
            add_products<Lanes, kRows, kColumns, true>(a + k, a_stride, b + k, b_stride, kStep, sums);
        if (k < width)
            add_products<Lanes, kRows, kColumns, false>(a + k, a_stride, b + k, b_stride, int(width - k), sums);
        a += round_up(width, kPadding);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) Lanes::template add_totals<kColumns>(sums[r], c + r * c_stride);
}

template <class Lanes, int kRows>
static void row_of_tiles(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a,
                         int64_t a_stride, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
    if constexpr (kRows > 1)
        if (rows < kRows)
            return row_of_tiles<Lanes, kRows - 1>(p, chunk, a, a_stride, rows, column, columns, c, c_stride);
    int64_t j = 0;
    for (; j + kTileColumns <= columns; j += kTileColumns)
        tile<Lanes, kRows, kTileColumns>(p, chunk, a, a_stride, column + j, c + j, c_stride);
    for (; j < columns; ++j) tile<Lanes, kRows, 1>(p, chunk, a, a_stride, column + j, c + j, c_stride);
}

// Asks for part `part` of `parts` of the weights of kRunColumns columns over one chunk.
template <class Element>
static void prefetch(const NgramEmbedding& p, const Chunk& chunk, int64_t column, int64_t part, int64_t parts) {
    const int64_t columns = std::min(kRunColumns, p.dim - column);
    for (int64_t i = chunk.first; i < chunk.end; ++i) {
        const auto& weights = p.tables[size_t(i)].projection;
        for (int64_t j = part; j < columns; j += parts) {
            const auto* row = static_cast<const Element*>(weights.data) + (column + j) * weights.stride;
            for (int64_t k = 0; k < weights.width; k += int64_t(kLine / sizeof(Element))) __builtin_prefetch(row + k);
        }
    }
}

template <class Lanes>
static void products(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a, int64_t a_stride,
                     int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
    for (int64_t j = 0; j < columns; j += kRunColumns)
        for (int64_t r = 0; r < rows; r += Lanes::kRows) {
            prefetch<typename Lanes::Element>(p, chunk, column + j + kRunColumns, r / Lanes::kRows,
                                              (rows + Lanes::kRows - 1) / Lanes::kRows);
            row_of_tiles<Lanes, Lanes::kRows>(p, chunk, a + r * a_stride, a_stride, rows - r, column + j,
                                              std::min(kRunColumns, columns - j), c + r * c_stride + j, c_stride);
        }
}

static void products_of(const NgramEmbedding& p, const Chunk& chunk, const void* a, int64_t a_stride, int64_t rows,
                        int64_t column, int64_t columns, float* c, int64_t c_stride) {
    if (p.dtype == DType::float32)
        products<Floats>(p, chunk, static_cast<const float*>(a), a_stride, rows, column, columns, c, c_stride);
    else
        products<Halves>(p, chunk, static_cast<const BFloat16*>(a), a_stride, rows, column, columns, c, c_stride);
}

template <class T>
static void write(const NgramEmbedding& p, int64_t t, int64_t column, int64_t columns, const float* sums) {
    const int64_t id = p.ids.at(t / p.length, t % p.length);
    T* __restrict out = static_cast<T*>(p.out) + t * p.dim + column;
    if (id < 0) return std::fill(out, out + columns, T{});
    const T* __restrict word = static_cast<const T*>(p.word.data) + id * p.word.stride + column;
    const auto share = p.rule.ignores(id) ? 1.0f : float(1.0 / double(1 + p.tables.size()));
    if (sums == nullptr)
        for (int64_t d = 0; d < columns; ++d) out[d] = from_float<T>(to_float(word[d]) * share);
    else
        for (int64_t d = 0; d < columns; ++d) out[d] = from_float<T>((to_float(word[d]) + sums[d]) * share);
}

static void write_of(const NgramEmbedding& p, int64_t t, int64_t column, int64_t columns, const float* sums) {
    if (p.dtype == DType::float32)
        write<float>(p, t, column, columns, sums);
    else
        write<BFloat16>(p, t, column, columns, sums);
}

constexpr NgramKernels kKernels = {products_of, write_of};
