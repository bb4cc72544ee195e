#include "longcat/rvq_encode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "rvq_kernels.h"

namespace longcat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBatchBytes = 8 << 20;   // of rows prepared at a time
constexpr int64_t kPieceBytes = 8 << 20;   // of a codebook packed at a time
constexpr int64_t kCachedBytes = 3 << 20;  // of rows that pass each panel together: what the last cache keeps
constexpr int64_t kMostTiles = 64;         // of them: short rows, whose states fill the second-level cache
constexpr size_t kGramRows = 4;            // that take turns in the Gram form
constexpr int64_t kScoresBytes = 8 << 20;  // of a thread's scores in the Gram form

bool is_kept(const RvqEncode& p, int64_t row) { return p.mask == nullptr || p.mask[row]; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    if (!is_kept(p, t))
        std::fill(row, row + p.dim, 0.0f);
    else if (p.column_stride == 1)
        for (int64_t d = 0; d < p.dim; ++d) row[d] = to_float(x[d]);
    else
        for (int64_t d = 0; d < p.dim; ++d) row[d] = to_float(x[d * p.column_stride]);
    round_residual(p, row);
}

template <class T>
void store_row(const RvqEncode& p, int64_t t, const float* sum) {
    T* out = static_cast<T*>(p.quantized) + t * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = from_float<T>(sum[d]);
}

// One thread's share of a batch.
struct Share {
    int64_t first_tile, last_tile;
    double* terms;
};

// Rows that are encoded together, and the memory for it.
struct Batch {
    const RvqEncode& p;
    int64_t first, rows;  // of x
    int64_t stride;       // of a prepared row, in units
    uint32_t* units;
    Tile* tiles;
    float* sums;      // [rows, dim] of the codewords, from the first level to the last
    double* squares;  // [rows] of the residual after the level
    std::vector<double*> terms;

    const RvqKernels& kernels(size_t level) const {
        return rvq_kernels(p.packed.empty() ? p.isa : p.packed[level].isa);
    }

    // Calls body(share) on every thread.
    template <class Body>
    void share(size_t level, const Body& body) const {
        const int64_t count = ceil_div(rows, kernels(level).tile_rows), threads = int64_t(terms.size());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t t = 0; t < threads; ++t)
            body(Share{t * count / threads, (t + 1) * count / threads, terms[size_t(t)]});
    }
};

// Readies one lane: whatever is not a row to be screened finds nothing.
void start_lane(const Batch& batch, const RvqKernels& kernels, const float* centre, int64_t row, Tile& tile, int lane) {
    const RvqEncode& p = batch.p;
    Candidates& found = tile.found[lane];
    found.count = 0, found.best = -1;
    tile.bound[lane] = kInfinity, tile.by_length[lane] = tile.by_error[lane] = 0;
    uint32_t* units = batch.units + row * batch.stride;
    const bool used = row < batch.rows && is_kept(p, batch.first + row);
    if (!used) {
        std::fill(units, units + ceil_div(p.dim, kernels.step), 0u);
        tile.row[lane] = nullptr;
        return;
    }
    tile.row[lane] = p.residual + (batch.first + row) * p.dim;
    const RowBounds bounds = kernels.prepare_row(tile.row[lane], centre, p.dim, units);
    tile.finite[lane] = bounds.finite, tile.exhaustive[lane] = bounds.finite && bounds.exhaustive;
    if (!bounds.finite || bounds.exhaustive) return;
    tile.bound[lane] = kLowest;
    tile.by_length[lane] = bounds.by_length, tile.by_error[lane] = bounds.by_error, tile.margin[lane] = bounds.margin;
}

void start_tiles(const Batch& batch, size_t level, const float* centre, const Share& share) {
    const RvqKernels& kernels = batch.kernels(level);
    for (int64_t i = share.first_tile; i < share.last_tile; ++i) {
        Tile& tile = batch.tiles[i];
        std::fill(tile.bound, tile.bound + 16, kInfinity);
        std::fill(tile.by_length, tile.by_length + 16, 0.0f);
        std::fill(tile.by_error, tile.by_error + 16, 0.0f);
        for (int lane = 0; lane < kernels.tile_rows; ++lane)
            start_lane(batch, kernels, centre, i * kernels.tile_rows + lane, tile, lane);
    }
}

// Screens a thread's tiles against a part of the codebook, block by block.
void screen_tiles(const Batch& batch, const RvqKernels& kernels, const Part& part, const Share& share) {
    const int64_t tile_units = kernels.tile_rows * batch.stride;
    const int64_t block = std::clamp<int64_t>(kCachedBytes / (4 * tile_units), 1, kMostTiles);
    for (int64_t i = share.first_tile; i < share.last_tile; i += block) {
        const int64_t count = std::min(block, share.last_tile - i);
        if (!part.packed.header->exhaustive)
            kernels.screen(part, batch.units + i * tile_units, batch.stride, count, batch.tiles + i);
    }
    for (int64_t i = share.first_tile; i < share.last_tile; ++i) {
        Tile& tile = batch.tiles[i];
        for (int lane = 0; lane < kernels.tile_rows; ++lane)
            if (tile.row[lane] != nullptr && tile.finite[lane] &&
                (tile.exhaustive[lane] || part.packed.header->exhaustive))
                resolve_all(tile.found[lane], kernels, part, tile.row[lane]);
    }
}

// Writes the row's code, -1 where it is left out.
int64_t choose(const Batch& batch, const RvqKernels& kernels, size_t level, const Part& part, Tile& tile, int lane,
               int64_t row) {
    const RvqEncode& p = batch.p;
    int64_t& code = p.codes[(batch.first + row) * int64_t(p.levels.size()) + int64_t(level)];
    if (tile.row[lane] == nullptr) return code = -1;
    Candidates& found = tile.found[lane];
    if (found.best < 0 && drop_losers(found, tile.bound[lane]) == 1)
        found.best = found.word[0];
    else
        resolve(found, tile.bound[lane], kernels, part, tile.row[lane]);
    return code = std::max<int64_t>(0, found.best);
}

// Takes the codeword off the row's residual.
void take_off(const Batch& batch, const RvqKernels& kernels, const Part& part, int64_t row, int64_t code) {
    const RvqEncode& p = batch.p;
    batch.squares[row] = 0;
    if (code < 0) return;
    float* residual = p.residual + (batch.first + row) * p.dim;
    kernels.take_off(residual, batch.sums + row * p.dim, part.book.words + code * part.book.stride, p.dim);
    round_residual(p, residual);
    batch.squares[row] = kernels.tree_dot(residual, residual, p.dim, part.terms);
}

void choose_all(const Batch& batch, size_t level, const PackedCodebook& packed, int64_t offset, const Share& share) {
    const RvqKernels& kernels = batch.kernels(level);
    const Part part{packed, batch.p.levels[level], offset, share.terms};
    for (int64_t i = share.first_tile; i < share.last_tile; ++i) {
        for (int lane = 0; lane < kernels.tile_rows && i * kernels.tile_rows + lane < batch.rows; ++lane) {
            const int64_t row = i * kernels.tile_rows + lane;
            take_off(batch, kernels, part, row, choose(batch, kernels, level, part, batch.tiles[i], lane, row));
        }
    }
}

// A codebook that nobody prepared: packed here, piece by piece, so that little memory is needed.
struct Pieces {
    Buffer<char> memory{0};
    int64_t size = 0;  // entries of a piece
    Codebook held{};   // the codebook that lies there, if one piece holds all of it

    explicit Pieces(const RvqEncode& p) {
        if (!p.packed.empty()) return;
        int64_t most = 0;
        for (const Codebook& book : p.levels) most = std::max(most, book.entries);
        const int panel = rvq_kernels(p.isa).panel_words;
        const int64_t a_panel = packed_bytes(panel, p.dim, p.isa);
        size = std::min(ceil_div(most, panel), std::max<int64_t>(1, kPieceBytes / a_panel)) * panel;
        memory = Buffer<char>(packed_bytes(size, p.dim, p.isa));
    }

    PackedCodebook view(const RvqEncode& p, int64_t entries) const {
        return packed_view(memory.data(), entries, p.dim, p.isa);
    }
};

// Finds the codes of a level.
void encode_level(const Batch& batch, size_t level, Pieces& pieces) {
    const RvqEncode& p = batch.p;
    const Codebook& book = p.levels[level];
    const bool prepared = !p.packed.empty();
    const int64_t size = prepared ? book.entries : std::min(pieces.size, book.entries);
    PackedCodebook packed = prepared ? p.packed[level] : pieces.view(p, size);
    const bool held = pieces.held == book;
    if (!prepared && !held) pack_centre(book, packed);
    batch.share(level, [&](const Share& share) { start_tiles(batch, level, packed.centre, share); });
    int64_t offset = 0;
    for (; offset < book.entries; offset += size) {
        const int64_t count = std::min(size, book.entries - offset);
        if (!prepared && !held) {
            packed = pieces.view(p, count);
            pack_codebook({book.words + offset * book.stride, count, book.stride}, packed, p.threads);
        }
        batch.share(level, [&](const Share& share) {
            screen_tiles(batch, batch.kernels(level), Part{packed, book, offset, share.terms}, share);
        });
    }
    pieces.held = size == book.entries ? book : Codebook{};
    offset -= size;
    batch.share(level, [&](const Share& share) { choose_all(batch, level, packed, offset, share); });
}

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

    // Sends for what the next steps read, while other rows have their turn.
    void chose(const RvqEncode& p, const Part& part, int64_t chosen) {
        code = chosen;
        if (code < 0) return;
        products = p.gram + code * part.packed.padded;
        const float* word = part.book.words + code * part.book.stride;
        for (int64_t d = 0; d < p.dim; d += 16) __builtin_prefetch(word + d, 0, 2);
        for (int64_t k = 0; k < part.packed.padded; k += 16) __builtin_prefetch(products + k, 0, 2);
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

// Encodes all levels of a few rows from their scores; `squares` [rows, levels].
void encode_gram_rows(const Batch& batch, const RvqKernels& kernels, const Part& part, GramRow* first, GramRow* last,
                      double centre_length, double* squares) {
    const size_t levels = batch.p.levels.size();
    for (size_t level = 0; level < levels; ++level) {
        for (GramRow* r = first; r != last; ++r) {
            if (r->is_screened())
                kernels.screen_scores(part, r->scores, r->products, *r->tile, r->lane);
            else if (r->tile->row[r->lane] != nullptr && r->tile->finite[r->lane])
                resolve_all(r->tile->found[r->lane], kernels, part, r->tile->row[r->lane]);
            r->chose(batch.p, part, choose(batch, kernels, level, part, *r->tile, r->lane, r->row));
        }
        for (GramRow* r = first; r != last; ++r) {
            take_off(batch, kernels, part, r->row, r->code);
            squares[r->row * int64_t(levels) + int64_t(level)] = batch.squares[r->row];
            r->next_level(part.packed, batch.squares[r->row], centre_length);
        }
    }
}

// Encodes all levels of a batch; `squares` [rows, levels].
void encode_by_gram(const Batch& batch, double* squares) {
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
                                 rows.data() + std::min(rows.size(), r + kGramRows), centre_length, squares);
        }
    });
}

bool by_gram(const RvqEncode& p) {
    return p.gram != nullptr && p.levels.size() > 1 && p.residual_dtype == DType::float32 &&
           !p.packed[0].header->exhaustive;
}

void encode_batch(const Batch& batch, Pieces& pieces, std::vector<double>& totals) {
    const RvqEncode& p = batch.p;
    const size_t levels = p.levels.size();
    if (by_gram(p)) {
        std::vector<double> squares(size_t(batch.rows) * levels);
        encode_by_gram(batch, squares.data());
        for (size_t i = 0; i < squares.size(); ++i) totals[i % levels] += squares[i];
        return;
    }
    for (size_t level = 0; level < levels; ++level) {
        encode_level(batch, level, pieces);
        for (int64_t row = 0; row < batch.rows; ++row) totals[level] += batch.squares[row];
    }
}

// Reads the rows of a batch, and zeroes the sums of their codewords.
void load_rows(Batch& batch) {
    const RvqEncode& p = batch.p;
    dispatch_float(p.dtype, "rvq_encode: x", [&](auto type) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t row = 0; row < batch.rows; ++row) {
            load_row<decltype(type)>(p, batch.first + row);
            std::fill(batch.sums + row * p.dim, batch.sums + (row + 1) * p.dim, 0.0f);
        }
    });
}

void store_rows(const Batch& batch) {
    const RvqEncode& p = batch.p;
    if (p.dtype == DType::float32) return;  // the sums are where they belong
    dispatch_float(p.dtype, "rvq_encode: x", [&](auto type) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t row = 0; row < batch.rows; ++row)
            store_row<decltype(type)>(p, batch.first + row, batch.sums + row * p.dim);
    });
}

}  // namespace

void rvq_encode(const RvqEncode& p) {
    // An odd number of cache lines a row keeps the rows of a tile out of each other's cache sets.
    const int64_t stride = (ceil_div(p.dim, 16) | 1) * 16;
    const int64_t batch_rows = std::min(p.rows, std::max<int64_t>(kBatchBytes / (4 * stride), 256 * p.threads));
    const int64_t padded = ceil_div(batch_rows, kMostRows) * kMostRows;
    const Buffer<uint32_t> units(padded * stride);
    const Buffer<Tile> tiles(ceil_div(padded, 6));
    std::vector<double> squares(static_cast<size_t>(batch_rows)), totals(p.levels.size());
    std::vector<Buffer<double>> terms;
    const Buffer<float> sums(p.dtype == DType::float32 ? 0 : batch_rows * p.dim);
    Batch batch{p, 0, 0, stride, units.data(), tiles.data(), nullptr, squares.data(), {}};
    for (int t = 0; t < p.threads; ++t) {
        terms.emplace_back(tree_terms(p.dim));
        batch.terms.push_back(terms.back().data());
    }
    Pieces pieces(p);
    for (; batch.first < p.rows; batch.first += batch_rows) {
        batch.rows = std::min(batch_rows, p.rows - batch.first);
        batch.sums = p.dtype == DType::float32 ? static_cast<float*>(p.quantized) + batch.first * p.dim : sums.data();
        load_rows(batch);
        encode_batch(batch, pieces, totals);
        store_rows(batch);
    }
    int64_t kept = 0;
    for (int64_t t = 0; t < p.rows; ++t) kept += is_kept(p, t);
    for (size_t level = 0; level < totals.size(); ++level)
        p.losses[level] = float(totals[level] / double(std::max<int64_t>(1, kept * p.dim)));
}

void rvq_gram(const Codebook& book, const PackedCodebook& packed, [[maybe_unused]] int threads, float* gram) {
    const RvqKernels& kernels = rvq_kernels(packed.isa);
    LC_CHECK(kernels.step == 1, "rvq_gram: the codebook must be packed as float32");
    const int64_t stride = (ceil_div(packed.dim, 16) | 1) * 16, block = 8 * kernels.tile_rows;
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
