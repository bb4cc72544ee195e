// The Gram form of rvq_encode: all levels of a shared codebook by one product, see rvq_kernels.h.
#include <algorithm>
#include <cmath>

#include "rvq_batch.h"

namespace longcat::rvq {
namespace {

constexpr size_t kGramRows = 4;            // that take turns in the Gram form
constexpr int64_t kScoresBytes = 8 << 20;  // of a thread's scores in the Gram form

double length_of(const float* values, int64_t dim) {
    double squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += double(values[d]) * double(values[d]);
    return std::sqrt(squares) * (1 + 0x1p-30);
}

// One row of the Gram form as codewords are taken off it.
struct GramRow {
    int64_t row;
    float* scores;
    Tile* tile;
    int lane;
    double by_length, by_error;
    int64_t code;           // of the last level
    const float* products;  // of the last codeword with all others; null at first

    GramRow(int64_t index, float* memory, Tile& state, int place)
        : row(index),
          scores(memory),
          tile(&state),
          lane(place),
          by_length(double(state.by_length[place])),
          by_error(double(state.by_error[place])),
          code(-1),
          products(nullptr) {}

    bool is_screened() const { return tile->row[lane] != nullptr && tile->finite[lane] && !tile->exhaustive[lane]; }

    const float* reads() const { return products != nullptr ? products : scores; }

    // Sends for the codeword, which is taken off once other rows have had their turn.
    void chose(const RvqEncode& p, const Part& part, int64_t chosen) {
        code = chosen;
        if (code < 0) return;
        products = p.gram + code * part.packed.padded;
        const float* word = part.book.words + code * part.book.stride;
        for (int64_t d = 0; d < p.dim; d += 16) __builtin_prefetch(word + d, 0, 2);
    }

    // Readies the next level, given the square of the residual's length.
    void next_level(const PackedCodebook& packed, double square, double centre_length) {
        if (code < 0) return;
        const double length = std::sqrt(square) * (1 + 0x1p-30);
        const RowBounds word = word_bounds(packed, code);
        by_length += double(word.by_length) + 16 * 0x1p-24 * (length + centre_length);
        by_error += double(word.by_error);
        tile->by_length[lane] = std::nextafter(float(by_length), kInfinity);
        tile->by_error[lane] = std::nextafter(float(by_error), kInfinity);
        tile->margin[lane] = float(0x1p-44 * length * length);
        tile->bound[lane] = is_screened() ? kLowest : kInfinity;
        tile->found[lane].count = 0, tile->found[lane].best = -1;
    }
};

// Encodes all levels of a few rows from their scores.
void encode_gram_rows(const Batch& batch, const RvqKernels& kernels, const Part& part, GramRow* first, GramRow* last,
                      double centre_length) {
    const size_t levels = batch.p.levels.size();
    for (size_t level = 0; level < levels; ++level) {
        for (GramRow* r = first; r != last; ++r) {
            const GramRow* next = r + 1 != last ? r + 1 : level + 1 < levels ? first : nullptr;
            if (r->is_screened())
                kernels.screen_scores(part, r->scores, r->products, *r->tile, r->lane,
                                      next != nullptr ? next->reads() : nullptr);
            else if (r->tile->row[r->lane] != nullptr && r->tile->finite[r->lane])
                resolve_all(r->tile->found[r->lane], kernels, part, r->tile->row[r->lane]);
            const int64_t code = choose(batch, kernels, level, part, *r->tile, r->lane, r->row);
            r->chose(batch.p, part, code);
        }
        for (GramRow* r = first; r != last; ++r) {
            const double square = take_off(batch, kernels, level, part, r->row, r->code);
            r->next_level(part.packed, square, centre_length);
        }
    }
}

}  // namespace

void encode_by_gram(const Batch& batch) {
    const PackedCodebook& packed = batch.p.packed[0];
    const RvqKernels& kernels = batch.kernels(0);
    const double centre_length = length_of(packed.centre, batch.p.dim);
    const int64_t pitch = packed.padded + 16;  // keeps the rows of a tile out of each other's cache sets
    const int64_t block = std::max<int64_t>(1, kScoresBytes / (4 * pitch * kernels.tile_rows));
    batch.share(0, [&](const Share& share) {
        start_tiles(batch, 0, packed.centre, share);
        const Buffer<float> scores(block * kernels.tile_rows * pitch);
        const Part part{packed, batch.p.levels[0], 0, share.terms};
        std::vector<GramRow> rows;
        for (int64_t i = share.first_tile; i < share.last_tile; i += block) {
            const int64_t count = std::min(block, share.last_tile - i), first = i * kernels.tile_rows;
            kernels.scores(packed, packed.start, batch.units + first * batch.stride, batch.stride, count, scores.data(),
                           pitch);
            rows.clear();
            for (int64_t r = 0; r < count * kernels.tile_rows && first + r < batch.rows; ++r)
                rows.emplace_back(first + r, scores.data() + r * pitch, batch.tiles[i + r / kernels.tile_rows],
                                  int(r % kernels.tile_rows));
            for (size_t r = 0; r < rows.size(); r += kGramRows)
                encode_gram_rows(batch, kernels, part, rows.data() + r,
                                 rows.data() + std::min(rows.size(), r + kGramRows), centre_length);
        }
    });
}

}  // namespace longcat::rvq

namespace longcat {

void rvq_gram(const Codebook& book, const PackedCodebook& packed, [[maybe_unused]] int threads, float* gram) {
    using namespace rvq;
    const RvqKernels& kernels = rvq_kernels(packed.isa);
    LC_CHECK(kernels.step == 1, "rvq_gram: the codebook must be packed as float32");
    const int64_t stride = odd_pitch(packed.dim), block = 8 * kernels.tile_rows;
    const std::vector<float> zeros(size_t(std::max(packed.dim, packed.padded)), 0.0f);
    const int64_t blocks = ceil_div(book.entries, block);
#pragma omp parallel num_threads(threads)
    {
        const Buffer<uint32_t> units(block * stride);
        const Buffer<float> products(block * packed.padded);
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t count = std::min(block, book.entries - b * block);
            for (int64_t i = 0; i < block; ++i) {
                const float* word = book.words + (b * block + std::min(i, count - 1)) * book.stride;
                kernels.prepare_row(word, zeros.data(), packed.dim, units.data() + i * stride);
            }
            kernels.scores(packed, zeros.data(), units.data(), stride, 8, products.data(), packed.padded);
            std::copy(products.data(), products.data() + count * packed.padded, gram + b * block * packed.padded);
        }
    }
}

}  // namespace longcat
