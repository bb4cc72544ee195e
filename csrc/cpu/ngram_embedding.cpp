#include "longcat/ngram_embedding.h"

#include <algorithm>
#include <cstring>

#if LC_X86
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace longcat {
namespace {

constexpr size_t kLine = 64;              // bytes
constexpr int64_t kPadding = 32;          // elements: looked-up rows are padded with zeros to whole steps
constexpr int64_t kBlockBytes = 1 << 21;  // of the looked-up rows that the weights go by: the more, the less often
constexpr int64_t kLeastTokens = 16;      // of a block
constexpr int64_t kChunkBytes = 2048;     // of a row that are multiplied in turn
constexpr int64_t kSpanColumns = 64;      // whose sums are finished in turn
constexpr int64_t kRunColumns = 16;  // whose weights stay in the L1 cache beside a tile's rows while all rows go by
constexpr int kTileColumns = 4;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Tables [first, end), whose rows start at element `offset` of a padded row.
struct Chunk {
    int64_t first, end, offset;
};

// How looked-up rows lie side by side, and which of them are multiplied in turn.
struct Rows {
    int64_t width = 0;  // elements of a padded row
    std::vector<Chunk> chunks;

    Rows(const NgramEmbedding& p, int64_t element_bytes) {
        int64_t bytes = kChunkBytes;
        for (int64_t i = 0; i < int64_t(p.tables.size()); ++i) {
            const int64_t padded = round_up(p.tables[size_t(i)].rows.width, kPadding);
            if (bytes + padded * element_bytes > kChunkBytes) chunks.push_back({i, i, width}), bytes = 0;
            chunks.back().end = i + 1;
            bytes += padded * element_bytes;
            width += padded;
        }
    }
};

// The functions of one instruction set.
struct NgramKernels {
    // c[r][j] += a[r] . projections[column + j] over one chunk, for `rows` rows and `columns` columns.
    void (*products)(const NgramEmbedding& p, const Chunk& chunk, const void* a, int64_t a_stride, int64_t rows,
                     int64_t column, int64_t columns, float* c, int64_t c_stride);

    // Writes columns [column, column + columns) of token t; `sums`: of its lookups, null for a token that is not live.
    void (*write)(const NgramEmbedding& p, int64_t t, int64_t column, int64_t columns, const float* sums);
};

}  // namespace

namespace portable {
namespace {

// Four at a time.
template <class T>
struct Lanes {
    using Element = T;
    static constexpr int kStep = 4, kRows = 2;
    struct Values {
        float v[4];
    };
    using Sum = Values;
    static Sum zero() { return {{0, 0, 0, 0}}; }
    static Values load(const T* p) { return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}}; }
    static Values load_some(const T* p, int count) {
        Values values = zero();
        for (int i = 0; i < count; ++i) values.v[i] = to_float(p[i]);
        return values;
    }
    static Sum multiply_add(const Values& a, const Values& b, Sum c) {
        for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    template <int kColumns>
    static void add_totals(const Sum* sums, float* c) {
        for (int j = 0; j < kColumns; ++j) c[j] += (sums[j].v[0] + sums[j].v[2]) + (sums[j].v[1] + sums[j].v[3]);
    }
};
using Floats = Lanes<float>;
using Halves = Lanes<BFloat16>;
#include "ngram_embedding_body.h"

}  // namespace
}  // namespace portable

#if LC_X86
LC_TARGET_AVX2
namespace avx2 {
namespace {

struct Eight {
    static constexpr int kStep = 8, kRows = 2;
    using Values = __m256;
    using Sum = __m256;
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm256_fmadd_ps(a, b, c); }
    static float total(Sum sum) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    template <int kColumns>
    static void add_totals(const Sum* sums, float* c) {
        for (int j = 0; j < kColumns; ++j) c[j] += total(sums[j]);
    }
};

struct Floats : Eight {
    using Element = float;
    static Values load(const float* p) { return _mm256_loadu_ps(p); }
    static Values load_some(const float* p, int count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
    }
};

struct Halves : Eight {
    using Element = BFloat16;
    static Values load(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Values load_some(const BFloat16* p, int count) {
        BFloat16 some[kStep] = {};
        std::copy(p, p + count, some);
        return load(some);
    }
};
#include "ngram_embedding_body.h"

}  // namespace
}  // namespace avx2
LC_TARGET_END

LC_TARGET_AVX512
namespace avx512 {
namespace {

struct Sixteen {
    static constexpr int kStep = 16, kRows = 6;
    using Values = __m512;
    using Sum = __m512;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm512_fmadd_ps(a, b, c); }
    static Sum fold(Sum a, Sum b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    // Halves are folded onto each other; those of four sums at once.
    template <int kColumns>
    static void add_totals(const Sum* sums, float* c) {
        static_assert(kColumns == 1 || kColumns == 4);
        const Sum a = sums[0], b = kColumns == 1 ? a : sums[1], d = kColumns == 1 ? a : sums[2],
                  e = kColumns == 1 ? a : sums[3];
        const Sum ab = fold(a, b), de = fold(d, e);
        Sum four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, de, 0x88), _mm512_shuffle_f32x4(ab, de, 0xdd));
        four = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
        four = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
        const __m128 totals = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four));
        if constexpr (kColumns == 1)
            *c += _mm_cvtss_f32(totals);
        else
            _mm_storeu_ps(c, _mm_add_ps(_mm_loadu_ps(c), totals));
    }
};

struct Floats : Sixteen {
    using Element = float;
    static Values load(const float* p) { return _mm512_loadu_ps(p); }
    static Values load_some(const float* p, int count) {
        return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    }
};

struct Halves : Sixteen {
    using Element = BFloat16;
    static Values widen(__m256i bits) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Values load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Values load_some(const BFloat16* p, int count) {
        return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    }
};
#include "ngram_embedding_body.h"

}  // namespace
}  // namespace avx512
LC_TARGET_END

LC_TARGET_AVX512_BF16
namespace avx512_bf16 {
namespace {

using avx512::Floats;

// Pairs: two products a lane.
struct Halves : avx512::Sixteen {
    using Element = BFloat16;
    static constexpr int kStep = 32;
    using Values = __m512bh;
    static Values load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Values load_some(const BFloat16* p, int count) {
        return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
    }
    static Sum multiply_add(Values a, Values b, Sum c) { return _mm512_dpbf16_ps(c, a, b); }
};
#include "ngram_embedding_body.h"

}  // namespace
}  // namespace avx512_bf16
LC_TARGET_END
#endif

namespace {

const NgramKernels& kernels_for(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512_bf16) return avx512_bf16::kKernels;
    if (isa == Isa::avx512) return avx512::kKernels;
    if (isa == Isa::avx2) return avx2::kKernels;
#endif
    (void)isa;
    return portable::kKernels;
}

// The ids that count, place by place: 0 for those that are ignored or missing.
struct Context {
    const NgramEmbedding& p;
    int64_t back;  // places before the first

    int64_t at(int64_t row, int64_t place) const {
        if (place < 0 && p.history.data == nullptr) return 0;
        const int64_t id = place < 0 ? p.history.at(row, place + back) : p.ids.at(row, place);
        return id < 0 || p.rule.ignores(id) ? 0 : id;
    }
    bool same_document(int64_t row, int64_t a, int64_t b) const {
        return p.documents.data == nullptr ||
               p.documents.at(row, std::max<int64_t>(a, 0)) == p.documents.at(row, std::max<int64_t>(b, 0));
    }
};

// The hashes of one position. `powers`: base^distance modulo each table's rows, distance by distance from 1.
void hash(const NgramEmbedding& p, const std::vector<int64_t>& powers, int64_t row, int64_t place, int64_t* hashes) {
    const Context context{p, p.rule.neighbors - 1};
    const auto tables = int64_t(p.tables.size());
    const int64_t id = context.at(row, place);
    for (int64_t i = 0; i < tables; ++i) hashes[i] = id % p.tables[size_t(i)].rows.rows;
    if (id == 0) return;
    for (int64_t distance = 1; distance < p.rule.neighbors; ++distance) {
        const int64_t earlier = context.at(row, place - distance);
        if (earlier == 0 || earlier == p.rule.eos || !context.same_document(row, place - distance, place)) return;
        for (int64_t i = (distance - 1) * p.rule.splits; i < tables; ++i) {
            const int64_t size = p.tables[size_t(i)].rows.rows;
            const int64_t term = earlier % size * powers[size_t((distance - 1) * tables + i)];
            hashes[i] = (hashes[i] + term % size) % size;
        }
    }
}

void hash_all(const NgramEmbedding& p) {
    const auto tables = int64_t(p.tables.size());
    std::vector<int64_t> powers(size_t((p.rule.neighbors - 1) * tables));
    for (int64_t i = 0; i < tables; ++i) {
        const int64_t size = p.tables[size_t(i)].rows.rows, base = p.rule.base % size;
        int64_t power = 1 % size;
        for (int64_t distance = 1; distance < p.rule.neighbors; ++distance)
            powers[size_t((distance - 1) * tables + i)] = power = power * base % size;
    }
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t t = 0; t < p.batch * p.length; ++t) hash(p, powers, t / p.length, t % p.length, p.hashes + t * tables);
}

// What one thread works in. `rows` starts at a cache line: loads that cross two cost twice.
template <class T>
struct Scratch {
    std::vector<T> memory;
    T* rows;
    std::vector<float> sums;
    std::vector<int64_t> live;

    Scratch(int64_t row_elements, int64_t sum_elements)
        : memory(size_t(row_elements) + kLine), rows(memory.data()), sums(size_t(sum_elements)) {
        while (reinterpret_cast<uintptr_t>(rows) % kLine != 0) ++rows;
    }
};

// Puts the table rows of the live tokens of [first, last) side by side.
template <class T>
void look_up(const NgramEmbedding& p, const Rows& layout, int64_t first, int64_t last, Scratch<T>& scratch) {
    const size_t tables = p.tables.size();
    scratch.live.clear();
    for (int64_t t = first; t < last; ++t) {
        const int64_t* hashes = p.hashes + t * int64_t(tables);
        if (std::all_of(hashes, hashes + tables, [](int64_t n) { return n == 0; })) continue;
        T* out = scratch.rows + int64_t(scratch.live.size()) * layout.width;
        scratch.live.push_back(t);
        for (size_t i = 0; i < tables; ++i) {
            const NgramEmbedding::Matrix& table = p.tables[i].rows;
            const T* row = static_cast<const T*>(table.data) + hashes[i] * table.stride;
            T* end = out + round_up(table.width, kPadding);
            if (hashes[i] != 0) out = std::copy(row, row + table.width, out);
            std::fill(out, end, T{});
            out = end;
        }
    }
}

template <class T>
void embed_block(const NgramEmbedding& p, const Rows& layout, int64_t first, int64_t last, int64_t column,
                 int64_t columns, Scratch<T>& scratch) {
    look_up(p, layout, first, last, scratch);
    const auto live = int64_t(scratch.live.size());
    const NgramKernels& kernels = kernels_for(p.isa);
    float* sums = scratch.sums.data();
    for (const int64_t end = column + columns; column < end; column += kSpanColumns) {
        const int64_t count = std::min(kSpanColumns, end - column);
        std::fill(sums, sums + live * kSpanColumns, 0.0f);
        for (const Chunk& chunk : layout.chunks)
            kernels.products(p, chunk, scratch.rows + chunk.offset, layout.width, live, column, count, sums,
                             kSpanColumns);
        for (int64_t t = first, i = 0; t < last; ++t) {
            const bool is_live = i < live && scratch.live[size_t(i)] == t;
            kernels.write(p, t, column, count, is_live ? sums + i++ * kSpanColumns : nullptr);
        }
    }
}

template <class T>
void embed(const NgramEmbedding& p) {
    const Rows layout(p, sizeof(T));
    const int64_t tokens = p.batch * p.length, share = (tokens + p.threads - 1) / p.threads;
    const int64_t fitting = kBlockBytes / (std::max<int64_t>(1, layout.width) * int64_t(sizeof(T)));
    const int64_t block = std::min(std::max<int64_t>(kLeastTokens, fitting), std::max(kLeastTokens, share));
    const int64_t blocks = (tokens + block - 1) / block;
    // Few tokens are shared out by columns instead.
    const int64_t spans = std::max<int64_t>(1, std::min((p.threads + blocks - 1) / blocks, p.dim / kSpanColumns));
    const int64_t span = round_up((p.dim + spans - 1) / spans, kTileColumns);
#pragma omp parallel num_threads(p.threads)
    {
        Scratch<T> scratch(std::min(block, tokens) * layout.width, std::min(block, tokens) * kSpanColumns);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * spans; ++task) {
            const int64_t first = task / spans * block, column = task % spans * span;
            const int64_t columns = std::min(span, p.dim - column);
            if (columns > 0) embed_block(p, layout, first, std::min(first + block, tokens), column, columns, scratch);
        }
    }
}

}  // namespace

void ngram_embedding(const NgramEmbedding& p) {
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t s = 0; s < p.length; ++s)
            LC_CHECK(p.ids.at(b, s) >= -1 && p.ids.at(b, s) < p.word.rows, "ngram_embedding: ids must be in [-1, V)");
    if (p.batch * p.length == 0) return;
    hash_all(p);
    if (p.dtype == DType::float32)
        embed<float>(p);
    else
        embed<BFloat16>(p);
}

}  // namespace longcat
