#include "longcat/rvq_encode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#if LC_X86
#include <immintrin.h>
#endif

namespace longcat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLongest = 1e18;  // beyond it float32 products could overflow

// Floats on cache lines.
class Floats {
  public:
    explicit Floats(int64_t count) : data_(static_cast<float*>(::operator new(size_t(count + 1) * 4, kLine))) {}
    float* data() { return data_.get(); }
    const float* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(float* pointer) const { ::operator delete(pointer, kLine); }
    };
    std::unique_ptr<float, Free> data_;
};

// Sum of a_d b_d: halves are folded onto each other, from a power of two that zeros fill up, until one term is left.
// `scratch` has at least half that power.
double tree_dot(const float* a, const float* b, int64_t dim, double* scratch) {
    if (dim == 1) return double(a[0]) * b[0];
    int64_t half = 1;
    while (half * 2 < dim) half *= 2;
    const int64_t paired = dim - half;
    for (int64_t d = 0; d < paired; ++d) scratch[d] = double(a[d]) * b[d] + double(a[half + d]) * b[half + d];
    for (int64_t d = paired; d < half; ++d) scratch[d] = double(a[d]) * b[d];
    while (half > 1) {
        half /= 2;
        for (int64_t d = 0; d < half; ++d) scratch[d] += scratch[half + d];
    }
    return scratch[0];
}

// A codebook as the screen reads it: panels of `panel` codewords, element by element, and the parts of the error bound.
// Codewords with NaN or infinity and those that fill up the last panel are zero, with infinite norms: never chosen.
struct PackedCodebook {
    RvqEncode::Codebook source;
    int64_t dim, padded;
    Floats words, norm_low, norm_high, length;
    std::vector<double> norms;

    PackedCodebook(const RvqEncode::Codebook& book, int64_t width, int panel)
        : source(book),
          dim(width),
          padded((book.entries + panel - 1) / panel * panel),
          words(padded * width),
          norm_low(padded),
          norm_high(padded),
          length(padded),
          norms(size_t(padded)) {}

    void pack(int64_t first, int panel, double* scratch) {
        float* out = words.data() + first * dim;
        for (int64_t k = first; k < first + panel; ++k) {
            const float* word = source.words + k * source.stride;
            double norm = k < source.entries ? tree_dot(word, word, dim, scratch) : double(kInfinity);
            if (!std::isfinite(norm)) norm = double(kInfinity);
            const bool usable = std::isfinite(norm);
            for (int64_t d = 0; d < dim; ++d) out[d * panel + (k - first)] = usable ? word[d] : 0.0f;
            describe(k, norm);
        }
    }

    void describe(int64_t k, double norm) {
        constexpr double kSlack = 6 * 0x1p-24;
        const double tiny = double(dim) * 0x1p-124, root = std::sqrt(norm);
        norms[size_t(k)] = norm;
        norm_low.data()[k] = std::nextafter(float(norm * (1 - kSlack) - tiny), -kInfinity);
        norm_high.data()[k] = std::nextafter(float(norm * (1 + kSlack) + tiny), kInfinity);
        length.data()[k] = std::nextafter(float(root), kInfinity);
        if (!std::isfinite(norm)) {
            norm_low.data()[k] = norm_high.data()[k] = kInfinity;
            length.data()[k] = 0;
        } else if (root > kLongest) {
            length.data()[k] = std::numeric_limits<float>::quiet_NaN();
        }
    }
};

// What the screen has found for one row: candidates in the order of their index.
struct RowState {
    static constexpr int kCapacity = 12;

    float slope;  // 2 (g + 4 u) |r|
    float bound;  // least score + E so far
    int count;
    bool full, finite;
    int64_t word[kCapacity];
    float low[kCapacity];

    void start(double norm, int64_t dim) {
        const double u = 0x1p-24, g = double(dim) * u / (1 - double(dim) * u), root = std::sqrt(norm);
        finite = std::isfinite(norm);
        slope = finite ? std::nextafter(float(2 * (g + 4 * u) * root), kInfinity) : 0.0f;
        if (finite && root > kLongest) slope = std::numeric_limits<float>::quiet_NaN();
        bound = finite ? kInfinity : -kInfinity;
        count = 0;
        full = false;
    }

    void consider(const PackedCodebook& book, int64_t first, uint32_t maybe, const float* dots, const float* lows) {
        for (; maybe != 0; maybe &= maybe - 1) {
            const int j = __builtin_ctz(maybe);
            const int64_t k = first + j;
            if (!std::isfinite(book.norms[size_t(k)])) continue;
            const float high = (book.norm_high.data()[k] - 2 * dots[j]) + slope * book.length.data()[k];
            if (high < bound) bound = high;
            if (lows[j] > bound || full) continue;
            if (count == kCapacity) drop_losers();
            full = count == kCapacity;
            if (full) continue;
            word[count] = k;
            low[count++] = lows[j];
        }
    }

    void drop_losers() {
        int kept = 0;
        for (int i = 0; i < count; ++i) {
            if (low[i] > bound) continue;
            word[kept] = word[i];
            low[kept++] = low[i];
        }
        count = kept;
    }

    int64_t nearest(const PackedCodebook& book, const float* row, double* scratch) {
        if (!finite) return 0;
        if (full) return nearest_of_all(book, row, scratch);
        drop_losers();
        if (count <= 1) return count == 1 ? word[0] : 0;
        int64_t best = 0;
        double least = double(kInfinity);
        for (int i = 0; i < count; ++i) take_lower(book, row, word[i], scratch, &least, &best);
        return best;
    }

  private:
    static int64_t nearest_of_all(const PackedCodebook& book, const float* row, double* scratch) {
        int64_t best = 0;
        double least = double(kInfinity);
        for (int64_t k = 0; k < book.source.entries; ++k)
            if (std::isfinite(book.norms[size_t(k)])) take_lower(book, row, k, scratch, &least, &best);
        return best;
    }

    static void take_lower(const PackedCodebook& book, const float* row, int64_t k, double* scratch, double* least,
                           int64_t* best) {
        const float* words = book.source.words + k * book.source.stride;
        const double score = book.norms[size_t(k)] - 2 * tree_dot(row, words, book.dim, scratch);
        if (score < *least) {
            *least = score;
            *best = k;
        }
    }
};

}  // namespace

namespace portable {
namespace {

struct Lanes {
    static constexpr int kWidth = 4;
    typedef float Vector __attribute__((vector_size(16), aligned(4)));
    Vector v;
    static Lanes load(const float* p) { return {*reinterpret_cast<const Vector*>(p)}; }
    static Lanes splat(float x) { return {Vector{x, x, x, x}}; }
    static Lanes multiply(Lanes a, Lanes b) { return {a.v * b.v}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {a.v * b.v + c.v}; }
    static Lanes subtract(Lanes a, Lanes b) { return {a.v - b.v}; }
    static uint32_t not_above(Lanes a, Lanes b) {
        const auto above = a.v > b.v;
        return uint32_t(!above[0]) | uint32_t(!above[1]) << 1 | uint32_t(!above[2]) << 2 | uint32_t(!above[3]) << 3;
    }
    void store(float* p) const { *reinterpret_cast<Vector*>(p) = v; }
};
constexpr int kTileRows = 6;
#include "rvq_encode_screen.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

struct Lanes {
    static constexpr int kWidth = 8;
    __m256 v;
    static Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Lanes splat(float x) { return {_mm256_set1_ps(x)}; }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes subtract(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static uint32_t not_above(Lanes a, Lanes b) {
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NGT_UQ)));
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
};
constexpr int kTileRows = 6;
#include "rvq_encode_screen.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

struct Lanes {
    static constexpr int kWidth = 16;
    __m512 v;
    static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
    static Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static uint32_t not_above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NGT_UQ); }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
};
constexpr int kTileRows = 12;
#include "rvq_encode_screen.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END
#endif

namespace {

// The part of the kernel that is compiled for each instruction set.
struct Screen {
    int tile_rows, panel_words;
    void (*run)(const PackedCodebook&, const float*, int64_t, RowState*);
};

Screen screen_for(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512) return {avx512::kTileRows, avx512::kPanelWords, avx512::screen};
    if (isa == Isa::avx2) return {avx2::kTileRows, avx2::kPanelWords, avx2::screen};
#endif
    (void)isa;
    return {portable::kTileRows, portable::kPanelWords, portable::screen};
}

bool is_kept(const RvqEncode& p, int64_t row) { return p.mask == nullptr || p.mask[row]; }

void round_residual(const RvqEncode& p, float* row) {
    if (p.residual_dtype == DType::float32) return;
    dispatch_float(p.residual_dtype, "rvq_encode: residual_dtype", [&](auto type) {
        for (int64_t d = 0; d < p.dim; ++d) row[d] = round_to<decltype(type)>(row[d]);
    });
}

template <class T>
void load_row(const RvqEncode& p, int64_t t) {
    const T* x = static_cast<const T*>(p.x) + t * p.row_stride;
    float* row = p.residual + t * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) row[d] = is_kept(p, t) ? to_float(x[d * p.column_stride]) : 0.0f;
    round_residual(p, row);
}

// Sums the row's codewords from the first level to the last.
template <class T>
void store_row(const RvqEncode& p, int64_t t, float* sum) {
    std::fill(sum, sum + p.dim, 0.0f);
    for (size_t level = 0; level < p.levels.size() && is_kept(p, t); ++level) {
        const float* word =
            p.levels[level].words + p.codes[t * int64_t(p.levels.size()) + int64_t(level)] * p.levels[level].stride;
        for (int64_t d = 0; d < p.dim; ++d) sum[d] += word[d];
    }
    T* out = static_cast<T*>(p.quantized) + t * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = from_float<T>(sum[d]);
}

// One thread's memory: a block of packed tiles, the states of its rows, and a row of doubles.
struct Scratch {
    Floats tiles;
    std::vector<RowState> states;
    std::vector<double> terms;
    Scratch(int64_t rows, int64_t dim) : tiles(rows * dim), states(size_t(rows)), terms(size_t(dim) + 1) {}
};

// Encodes rows [first, first + count) at one level and takes the codewords off their residuals.
void encode_block(const RvqEncode& p, const PackedCodebook& book, const Screen& screen, size_t level, int64_t first,
                  int64_t count, Scratch& scratch, double* squares) {
    const int64_t tiles = (count + screen.tile_rows - 1) / screen.tile_rows;
    for (int64_t i = 0; i < tiles * screen.tile_rows; ++i) {
        const float* row = p.residual + (first + std::min(i, count - 1)) * p.dim;
        float* out = scratch.tiles.data() + (i / screen.tile_rows * p.dim) * screen.tile_rows + i % screen.tile_rows;
        for (int64_t d = 0; d < p.dim; ++d) out[d * screen.tile_rows] = row[d];
        scratch.states[size_t(i)].start(tree_dot(row, row, p.dim, scratch.terms.data()), p.dim);
    }
    screen.run(book, scratch.tiles.data(), tiles, scratch.states.data());
    for (int64_t i = 0; i < count; ++i) {
        const int64_t t = first + i, levels = int64_t(p.levels.size());
        float* row = p.residual + t * p.dim;
        const int64_t code = scratch.states[size_t(i)].nearest(book, row, scratch.terms.data());
        p.codes[t * levels + int64_t(level)] = is_kept(p, t) ? code : -1;
        squares[t] = 0;
        if (!is_kept(p, t)) continue;
        const float* word = book.source.words + code * book.source.stride;
        for (int64_t d = 0; d < p.dim; ++d) row[d] -= word[d];
        round_residual(p, row);
        squares[t] = tree_dot(row, row, p.dim, scratch.terms.data());
    }
}

void load_rows(const RvqEncode& p) {
    dispatch_float(p.dtype, "rvq_encode: x", [&](auto type) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t t = 0; t < p.rows; ++t) load_row<decltype(type)>(p, t);
    });
}

void store_quantized(const RvqEncode& p) {
    dispatch_float(p.dtype, "rvq_encode: x", [&](auto type) {
#pragma omp parallel num_threads(p.threads)
        {
            std::vector<float> sum(size_t(p.dim));
#pragma omp for schedule(static)
            for (int64_t t = 0; t < p.rows; ++t) store_row<decltype(type)>(p, t, sum.data());
        }
    });
}

std::unique_ptr<PackedCodebook> packed(const RvqEncode& p, const RvqEncode::Codebook& source, int panel) {
    auto book = std::make_unique<PackedCodebook>(source, p.dim, panel);
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<double> terms(size_t(p.dim) + 1);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < book->padded; first += panel) book->pack(first, panel, terms.data());
    }
    return book;
}

// Rows encoded together: their tiles stay in the second-level cache while the codebook passes by.
int64_t block_rows(const RvqEncode& p, int tile_rows) {
    const int64_t per_thread = (p.rows + p.threads - 1) / p.threads, cached = (256 << 10) / (4 * p.dim);
    const int64_t wanted = std::max<int64_t>(1, std::min({per_thread, cached, int64_t(384)}));
    return (wanted + tile_rows - 1) / tile_rows * tile_rows;
}

}  // namespace

void rvq_encode(const RvqEncode& p) {
    const Screen screen = screen_for(p.isa);
    const int64_t block = block_rows(p, screen.tile_rows), blocks = (p.rows + block - 1) / block;
    std::vector<std::unique_ptr<Scratch>> scratch;
    for (int i = 0; i < p.threads; ++i) scratch.push_back(std::make_unique<Scratch>(block, p.dim));
    std::vector<double> squares(size_t(p.rows));
    int64_t kept = 0;
    for (int64_t t = 0; t < p.rows; ++t) kept += is_kept(p, t);

    load_rows(p);
    std::unique_ptr<PackedCodebook> book;
    for (size_t level = 0; level < p.levels.size(); ++level) {
        if (book == nullptr || !(book->source == p.levels[level]))
            book = packed(p, p.levels[level], screen.panel_words);
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int part = 0; part < p.threads; ++part)
            for (int64_t b = part; b < blocks; b += p.threads)
                encode_block(p, *book, screen, level, b * block, std::min(block, p.rows - b * block),
                             *scratch[size_t(part)], squares.data());
        double total = 0;
        for (int64_t t = 0; t < p.rows; ++t) total += squares[size_t(t)];
        p.losses[level] = float(total / double(std::max<int64_t>(1, kept * p.dim)));
    }
    store_quantized(p);
}

}  // namespace longcat
