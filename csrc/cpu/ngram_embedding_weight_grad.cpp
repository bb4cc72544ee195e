#include "longcat/ngram_embedding_weight_grad.h"

#include <algorithm>

#include "runs.h"

#if LC_X86
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace longcat {
namespace {

constexpr int64_t kPadding = 2;       // terms: packed rows are padded with zeros to whole units
constexpr int64_t kBlockTerms = 256;  // summed in turn: their rows of b stay in the L2 cache
constexpr int64_t kBlockTiles = 16;   // of one task

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The functions of one instruction set for one dtype; ngram_embedding_weight_grad_body.h says what they do.
template <class T>
struct Kernels {
    int64_t rows, terms;  // of a tile; of a unit
    void (*product)(const uint32_t* a, int64_t tiles, int64_t terms, const T* b, int64_t b_stride, int64_t width,
                    float* c);
    void (*pack_tokens)(const NgramEmbeddingWeightGrad& p, const int64_t* live, int64_t rows, uint32_t* out);
    void (*pack_columns)(const NgramEmbeddingWeightGrad& p, const int64_t* live, int64_t count, int64_t column,
                         uint32_t* out);
    void (*round_row)(const float* sums, int64_t count, float scale, void* row);
    void (*add_row)(const void* row, int64_t count, float* sums);
    void (*add_floats)(const void* row, int64_t count, float* sums);
};

}  // namespace

namespace portable {
namespace {

template <class T>
struct Lanes {
    using Element = T;
    static constexpr int kWidth = 4, kRows = 4, kTerms = 1;
    struct Values {
        float v[4];
    };
    using Sum = Values;
    static Sum zero() { return {{0, 0, 0, 0}}; }
    static Values splat(const uint32_t* unit) {
        const float x = float_of(*unit);
        return {{x, x, x, x}};
    }
    static uint32_t unit(T first, T) { return bits_of(to_float(first)); }
    static void load(const T* row, const T* next, Values& first, Values& second) {
        load_some(row, next, 8, first, second);
    }
    static void load_some(const T* row, const T*, int count, Values& first, Values& second) {
        for (int i = 0; i < 4; ++i) first.v[i] = i < count ? to_float(row[i]) : 0.0f;
        for (int i = 0; i < 4; ++i) second.v[i] = i + 4 < count ? to_float(row[i + 4]) : 0.0f;
    }
    static Sum multiply_add(const Values& a, const Values& b, Sum c) {
        for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static void store(const Sum& low, const Sum& high, float* out) {
        std::copy(low.v, low.v + 4, out);
        std::copy(high.v, high.v + 4, out + 4);
    }
};
using Floats = Lanes<float>;
using Halves = Lanes<BFloat16>;
#include "ngram_embedding_weight_grad_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

struct Eight {
    static constexpr int kWidth = 8, kRows = 6, kTerms = 1;
    using Values = __m256;
    using Sum = __m256;
    static Sum zero() { return _mm256_setzero_ps(); }
    static Values splat(const uint32_t* unit) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(unit)); }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(Sum low, Sum high, float* out) {
        _mm256_storeu_ps(out, low);
        _mm256_storeu_ps(out + 8, high);
    }
};

struct Floats : Eight {
    using Element = float;
    static uint32_t unit(float first, float) { return bits_of(first); }
    static void load(const float* row, const float*, Values& first, Values& second) {
        first = _mm256_loadu_ps(row);
        second = _mm256_loadu_ps(row + 8);
    }
    static void load_some(const float* row, const float* next, int count, Values& first, Values& second) {
        float some[16] = {};
        std::copy(row, row + count, some);
        load(some, next, first, second);
    }
};

struct Halves : Eight {
    using Element = BFloat16;
    static uint32_t unit(BFloat16 first, BFloat16) { return uint32_t(first.bits) << 16; }
    static Values widen(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void load(const BFloat16* row, const BFloat16*, Values& first, Values& second) {
        first = widen(row);
        second = widen(row + 8);
    }
    static void load_some(const BFloat16* row, const BFloat16* next, int count, Values& first, Values& second) {
        BFloat16 some[16] = {};
        std::copy(row, row + count, some);
        load(some, next, first, second);
    }
};
#include "ngram_embedding_weight_grad_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

struct Sixteen {
    static constexpr int kWidth = 16, kRows = 12, kTerms = 1;
    using Values = __m512;
    using Sum = __m512;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Values splat(const uint32_t* unit) { return _mm512_set1_ps(*reinterpret_cast<const float*>(unit)); }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(Sum low, Sum high, float* out) {
        _mm512_storeu_ps(out, low);
        _mm512_storeu_ps(out + 16, high);
    }
};

struct Floats : Sixteen {
    using Element = float;
    static uint32_t unit(float first, float) { return bits_of(first); }
    static void load(const float* row, const float*, Values& first, Values& second) {
        first = _mm512_loadu_ps(row);
        second = _mm512_loadu_ps(row + 16);
    }
    static void load_some(const float* row, const float*, int count, Values& first, Values& second) {
        const uint32_t mask = (1u << count) - 1;
        first = _mm512_maskz_loadu_ps(__mmask16(mask), row);
        second = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), row + 16);
    }
};

struct Halves : Sixteen {
    using Element = BFloat16;
    static uint32_t unit(BFloat16 first, BFloat16) { return uint32_t(first.bits) << 16; }
    static Values widen(__m256i bits) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void load(const BFloat16* row, const BFloat16*, Values& first, Values& second) {
        first = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
        second = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 16)));
    }
    static void load_some(const BFloat16* row, const BFloat16*, int count, Values& first, Values& second) {
        const uint32_t mask = (1u << count) - 1;
        first = widen(_mm256_maskz_loadu_epi16(__mmask16(mask), row));
        second = widen(_mm256_maskz_loadu_epi16(__mmask16(mask >> 16), row + 16));
    }
};
#include "ngram_embedding_weight_grad_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

using avx512::Floats;

// Pairs of terms: two products a lane. Interleaving two rows leaves their columns in another order until `store`.
struct Halves : avx512::Sixteen {
    using Element = BFloat16;
    static constexpr int kTerms = 2;
    using Values = __m512i;
    static uint32_t unit(BFloat16 first, BFloat16 second) { return uint32_t(second.bits) << 16 | first.bits; }
    static Values splat(const uint32_t* unit) { return _mm512_set1_epi32(int(*unit)); }
    static void interleave(__m512i row, __m512i next, Values& first, Values& second) {
        first = _mm512_unpacklo_epi16(row, next);
        second = _mm512_unpackhi_epi16(row, next);
    }
    static void load(const BFloat16* row, const BFloat16* next, Values& first, Values& second) {
        interleave(_mm512_loadu_si512(row), _mm512_loadu_si512(next), first, second);
    }
    static void load_some(const BFloat16* row, const BFloat16* next, int count, Values& first, Values& second) {
        const __mmask32 mask = (1u << count) - 1;
        interleave(_mm512_maskz_loadu_epi16(mask, row), _mm512_maskz_loadu_epi16(mask, next), first, second);
    }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
    static void store(Sum low, Sum high, float* out) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, second, high));
    }
};
#include "ngram_embedding_weight_grad_body.h"

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

namespace {

#if LC_X86
#define LC_KERNELS(name)                                   \
    if (isa == Isa::avx512_bf16) return avx512_bf16::name; \
    if (isa == Isa::avx512) return avx512::name;           \
    if (isa == Isa::avx2) return avx2::name;               \
    return portable::name
#else
#define LC_KERNELS(name) return (void)isa, portable::name
#endif

const Kernels<float>& kernels_for(Isa isa, float) { LC_KERNELS(kFloats); }
const Kernels<BFloat16>& kernels_for(Isa isa, BFloat16) { LC_KERNELS(kHalves); }

template <class T>
class WeightGrad {
  public:
    explicit WeightGrad(const NgramEmbeddingWeightGrad& problem)
        : p(problem), kernels(kernels_for(problem.isa, T{})), tables(int64_t(problem.tables.size())) {
        for (int64_t t = 0; t < p.grad.rows; ++t) {
            const int64_t* hashes = p.hashes + t * tables;
            for (int64_t i = 0; i < tables; ++i)
                LC_CHECK(hashes[i] >= 0 && hashes[i] < p.tables[size_t(i)].rows.rows,
                         "ngram_embedding_weight_grad: hashes must be rows of the tables");
            if (std::any_of(hashes, hashes + tables, [](int64_t n) { return n != 0; })) live.push_back(t);
        }
    }

    void run() {
        if (p.words > 0) words();
        const auto wants_rows = [](const auto& table) { return table.size > 0; };
        const auto wants_projection = [](const auto& table) { return table.grad_projection != nullptr; };
        if (std::any_of(p.tables.begin(), p.tables.end(), wants_rows)) rows();
        if (std::any_of(p.tables.begin(), p.tables.end(), wants_projection)) projections();
    }

  private:
    const NgramEmbeddingWeightGrad& p;
    const Kernels<T>& kernels;
    const int64_t tables;
    std::vector<int64_t> live;
    std::vector<uint32_t> units;  // packed gradients

    float share() const { return float(1.0 / double(1 + tables)); }

    int64_t tile_units(int64_t terms) const { return round_up(terms, kPadding) / kernels.terms * kernels.rows; }

    // out[key] = scale(key) * sum of the run's rows; the others of `size` rows are zero.
    template <class Key, class Row, class Scale>
    void sum_runs(int64_t count, const Key& key, const Row& add, const Scale& scale, void* out, int64_t size,
                  int64_t width) {
        const Runs runs(count, key);
        LC_CHECK(runs.order.empty() || key(runs.order.back()) < size,
                 "ngram_embedding_weight_grad: ids and slots must be rows of the gradients");
        T* rows = static_cast<T*>(out);
#pragma omp parallel num_threads(p.threads)
        {
            std::vector<float> sums(static_cast<size_t>(width));
            if (runs.count() < size) {
#pragma omp for schedule(static)
                for (int64_t k = 0; k < size; ++k) std::fill(rows + k * width, rows + (k + 1) * width, T{});
            }
#pragma omp for schedule(static)
            for (int64_t run = 0; run < runs.count(); ++run) {
                std::fill(sums.begin(), sums.end(), 0.0f);
                const int64_t first = runs.starts[size_t(run)], last = runs.starts[size_t(run) + 1];
                for (int64_t i = first; i < last; ++i) add(runs.order[size_t(i)], sums.data());
                const int64_t k = key(runs.order[size_t(first)]);
                kernels.round_row(sums.data(), width, scale(k), rows + k * width);
            }
        }
    }

    void words() {
        const auto id = [&](int64_t t) { return p.ids.at(t / p.length, t % p.length); };
        const auto add = [&](int64_t t, float* sums) {
            kernels.add_row(static_cast<const T*>(p.grad.data) + t * p.grad.stride, p.grad.width, sums);
        };
        const auto scale = [&](int64_t k) { return p.rule.ignores(k) ? 1.0f : share(); };
        sum_runs(p.grad.rows, id, add, scale, p.grad_word, p.words, p.grad.width);
    }

    void rows() {
        const auto count = int64_t(live.size());
        const int64_t dim = p.grad.width, tiles = (count + kernels.rows - 1) / kernels.rows;
        units.resize(size_t(tiles * tile_units(dim)));
#pragma omp parallel for schedule(static) num_threads(p.threads)
        for (int64_t tile = 0; tile < tiles; ++tile)
            kernels.pack_tokens(p, live.data() + tile * kernels.rows,
                                std::min(kernels.rows, count - tile * kernels.rows),
                                units.data() + tile * tile_units(dim));
        std::vector<float> products;
        for (int64_t i = 0; i < tables; ++i) {
            const auto& table = p.tables[size_t(i)];
            if (table.size == 0) continue;
            const int64_t width = table.rows.width;
            products.resize(size_t(tiles * kernels.rows * width));
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
            for (int64_t tile = 0; tile < tiles; tile += kBlockTiles)
                kernels.product(units.data() + tile * tile_units(dim), std::min(kBlockTiles, tiles - tile), dim,
                                static_cast<const T*>(table.projection.data), table.projection.stride, width,
                                products.data() + tile * kernels.rows * width);
            const auto slot = [&](int64_t n) {
                const int64_t at = live[size_t(n)] * tables + i;
                return p.hashes[at] == 0 ? -1 : p.slots[at];
            };
            const auto add = [&](int64_t n, float* sums) {
                kernels.add_floats(products.data() + n * width, width, sums);
            };
            sum_runs(count, slot, add, [&](int64_t) { return share(); }, table.grad_rows, table.size, width);
        }
    }

    void projections() {
        const auto count = int64_t(live.size());
        const int64_t dim = p.grad.width, tiles = (dim + kernels.rows - 1) / kernels.rows;
        units.resize(size_t(tiles * tile_units(count)));
#pragma omp parallel for schedule(static) num_threads(p.threads)
        for (int64_t tile = 0; tile < tiles; ++tile)
            kernels.pack_columns(p, live.data(), count, tile * kernels.rows, units.data() + tile * tile_units(count));
        std::vector<T> rows;
        for (int64_t i = 0; i < tables; ++i) {
            const auto& table = p.tables[size_t(i)];
            const int64_t width = table.rows.width;
            look_up(table, i, rows);
#pragma omp parallel num_threads(p.threads)
            {
                std::vector<float> sums(size_t(kBlockTiles * kernels.rows * width));
#pragma omp for schedule(dynamic)
                for (int64_t tile = 0; tile < tiles; tile += kBlockTiles) {
                    const int64_t first = tile * kernels.rows;
                    kernels.product(units.data() + tile * tile_units(count), std::min(kBlockTiles, tiles - tile), count,
                                    rows.data(), width, width, sums.data());
                    for (int64_t d = first; d < std::min(dim, first + kBlockTiles * kernels.rows); ++d)
                        kernels.round_row(sums.data() + (d - first) * width, width, share(),
                                          static_cast<T*>(table.grad_projection) + d * width);
                }
            }
        }
    }

    // The rows of table i of the live tokens, one below the other.
    void look_up(const NgramEmbeddingWeightGrad::Table& table, int64_t i, std::vector<T>& rows) const {
        const int64_t width = table.rows.width;
        rows.assign(live.size() * size_t(width), T{});
#pragma omp parallel for schedule(static) num_threads(p.threads)
        for (int64_t n = 0; n < int64_t(live.size()); ++n) {
            const int64_t hash = p.hashes[live[size_t(n)] * tables + i];
            const T* row = static_cast<const T*>(table.rows.data) + hash * table.rows.stride;
            if (hash != 0) std::copy(row, row + width, rows.data() + n * width);
        }
    }
};

}  // namespace

void ngram_embedding_weight_grad(const NgramEmbeddingWeightGrad& p) {
    if (p.dtype == DType::float32)
        WeightGrad<float>(p).run();
    else
        WeightGrad<BFloat16>(p).run();
}

}  // namespace longcat
