// The products of ngram_embedding for one instruction set. Included once for each, inside its namespace and target,
// after `Floats` and `Halves`: kStep elements at a time of float32 and bfloat16 rows. No include guard.

// Adds to `c` the products of kRows rows of a and kColumns rows of b over one chunk of tables.
template <class Lanes, int kRows, int kColumns>
static void tile(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a, int64_t a_stride,
                 int64_t column, float* c, int64_t c_stride) {
    using Element = typename Lanes::Element;
    typename Lanes::Sum sums[kRows][kColumns];
    for (auto& row : sums)
        for (auto& sum : row) sum = Lanes::zero();
    for (int64_t i = chunk.first; i < chunk.end; ++i) {
        const auto& weights = p.tables[size_t(i)].projection;
        const Element* b = static_cast<const Element*>(weights.data) + column * weights.stride;
        int64_t k = 0;
        for (; k + Lanes::kStep <= weights.width; k += Lanes::kStep) {
            typename Lanes::Values left[kRows];
            for (int r = 0; r < kRows; ++r) left[r] = Lanes::load(a + r * a_stride + k);
            for (int j = 0; j < kColumns; ++j) {
                const auto right = Lanes::load(b + j * weights.stride + k);
                for (int r = 0; r < kRows; ++r) sums[r][j] = Lanes::multiply_add(left[r], right, sums[r][j]);
            }
        }
        if (k < weights.width)
            for (int j = 0; j < kColumns; ++j) {
                const auto right = Lanes::load_some(b + j * weights.stride + k, int(weights.width - k));
                for (int r = 0; r < kRows; ++r)
                    sums[r][j] = Lanes::multiply_add(Lanes::load(a + r * a_stride + k), right, sums[r][j]);
            }
        a += round_up(weights.width, kPadding);
    }
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kColumns; ++j) c[r * c_stride + j] += Lanes::total(sums[r][j]);
}

template <class Lanes, int kRows>
static void row_of_tiles(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a,
                         int64_t a_stride, int64_t column, int64_t columns, float* c, int64_t c_stride) {
    if (columns == kTileColumns) return tile<Lanes, kRows, kTileColumns>(p, chunk, a, a_stride, column, c, c_stride);
    for (int64_t j = 0; j < columns; ++j) tile<Lanes, kRows, 1>(p, chunk, a, a_stride, column + j, c + j, c_stride);
}

// c[r][j] += a[r] . projections[column + j] over one chunk, for `rows` rows and `columns` columns.
template <class Lanes>
static void products(const NgramEmbedding& p, const Chunk& chunk, const typename Lanes::Element* a, int64_t a_stride,
                     int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
    for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int64_t count = std::min<int64_t>(kTileColumns, columns - j);
        for (int64_t r = 0; r < rows; r += Lanes::kRows) {
            const auto* left = a + r * a_stride;
            float* sums = c + r * c_stride + j;
            switch (std::min<int64_t>(Lanes::kRows, rows - r)) {
                case 1:
                    row_of_tiles<Lanes, 1>(p, chunk, left, a_stride, column + j, count, sums, c_stride);
                    break;
                case 2:
                    row_of_tiles<Lanes, 2>(p, chunk, left, a_stride, column + j, count, sums, c_stride);
                    break;
                case 3:
                    row_of_tiles<Lanes, 3>(p, chunk, left, a_stride, column + j, count, sums, c_stride);
                    break;
                default:
                    row_of_tiles<Lanes, 4>(p, chunk, left, a_stride, column + j, count, sums, c_stride);
            }
        }
    }
}

static void products_of(const NgramEmbedding& p, const Chunk& chunk, const void* a, int64_t a_stride, int64_t rows,
                        int64_t column, int64_t columns, float* c, int64_t c_stride) {
    if (p.dtype == DType::float32)
        products<Floats>(p, chunk, static_cast<const float*>(a), a_stride, rows, column, columns, c, c_stride);
    else
        products<Halves>(p, chunk, static_cast<const BFloat16*>(a), a_stride, rows, column, columns, c, c_stride);
}
