#include "longcat/rvq_encode.h"

#include <algorithm>
#include <cmath>

#include "rvq_batch.h"

namespace longcat::rvq {
namespace {

constexpr int64_t kBatchBytes = 8 << 20;   // of rows prepared at a time
constexpr int64_t kPieceBytes = 8 << 20;   // of a codebook packed at a time
constexpr int64_t kCachedBytes = 3 << 20;  // of rows that pass each panel together: what the last cache keeps
constexpr int64_t kMostTiles = 64;         // of them: short rows, whose states fill the second-level cache
constexpr size_t kGramLevels = 32;         // for more the bound has no room, and residuals could grow past float32

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

}  // namespace

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

double take_off(const Batch& batch, const RvqKernels& kernels, size_t level, const Part& part, int64_t row,
                int64_t code) {
    const RvqEncode& p = batch.p;
    double& square = batch.squares[row * int64_t(p.levels.size()) + int64_t(level)];
    if (code < 0) return square = 0;
    float* residual = p.residual + (batch.first + row) * p.dim;
    kernels.take_off(residual, batch.sums + row * p.dim, part.book.words + code * part.book.stride, p.dim);
    round_residual(p, residual);
    return square = kernels.tree_dot(residual, residual, p.dim, part.terms);
}

namespace {

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

void choose_all(const Batch& batch, size_t level, const Part& part, const Share& share) {
    const RvqKernels& kernels = batch.kernels(level);
    for (int64_t i = share.first_tile; i < share.last_tile; ++i) {
        for (int lane = 0; lane < kernels.tile_rows && i * kernels.tile_rows + lane < batch.rows; ++lane) {
            const int64_t row = i * kernels.tile_rows + lane;
            const int64_t code = choose(batch, kernels, level, part, batch.tiles[i], lane, row);
            take_off(batch, kernels, level, part, row, code);
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

// Finds the codes of a level whose codebook is packed piece by piece, by all threads together.
void encode_unpacked(const Batch& batch, size_t level, Pieces& pieces) {
    const RvqEncode& p = batch.p;
    const Codebook& book = p.levels[level];
    const int64_t size = std::min(pieces.size, book.entries);
    PackedCodebook packed = pieces.view(p, size);
    const bool held = pieces.held == book;
    if (!held) pack_centre(book, packed);
    batch.share(level, [&](const Share& share) { start_tiles(batch, level, packed.centre, share); });
    int64_t offset = 0;
    for (; offset < book.entries; offset += size) {
        const int64_t count = std::min(size, book.entries - offset);
        if (!held) {
            packed = pieces.view(p, count);
            pack_codebook({book.words + offset * book.stride, count, book.stride}, packed, p.threads);
        }
        batch.share(level, [&](const Share& share) {
            screen_tiles(batch, batch.kernels(level), Part{packed, book, offset, share.terms}, share);
        });
    }
    pieces.held = size == book.entries ? book : Codebook{};
    offset -= size;
    batch.share(level,
                [&](const Share& share) { choose_all(batch, level, Part{packed, book, offset, share.terms}, share); });
}

// Finds the codes of all levels, whose codebooks are packed already. Threads wait for each other only where the next
// level has other tiles.
void encode_packed(const Batch& batch) {
    const RvqEncode& p = batch.p;
    for (size_t first = 0, last = 0; first < p.levels.size(); first = last) {
        while (last < p.levels.size() && &batch.kernels(last) == &batch.kernels(first)) ++last;
        batch.share(first, [&](const Share& share) {
            for (size_t level = first; level < last; ++level) {
                const Part part{p.packed[level], p.levels[level], 0, share.terms};
                start_tiles(batch, level, part.packed.centre, share);
                screen_tiles(batch, batch.kernels(level), part, share);
                choose_all(batch, level, part, share);
            }
        });
    }
}

bool by_gram(const RvqEncode& p) {
    return p.gram != nullptr && p.levels.size() > 1 && p.levels.size() <= kGramLevels &&
           p.residual_dtype == DType::float32 && !p.packed[0].header->exhaustive;
}

void encode_batch(const Batch& batch, Pieces& pieces, std::vector<double>& totals) {
    const RvqEncode& p = batch.p;
    const size_t levels = p.levels.size();
    if (by_gram(p))
        encode_by_gram(batch);
    else if (!p.packed.empty())
        encode_packed(batch);
    else
        for (size_t level = 0; level < levels; ++level) encode_unpacked(batch, level, pieces);
    const double* square = batch.squares;
    for (int64_t row = 0; row < batch.rows; ++row)
        for (size_t level = 0; level < levels; ++level) totals[level] += *square++;
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
}  // namespace longcat::rvq

namespace longcat {

void rvq_encode(const RvqEncode& p) {
    using namespace rvq;
    const int64_t stride = odd_pitch(p.dim);
    const int64_t batch_rows = std::min(p.rows, std::max<int64_t>(kBatchBytes / (4 * stride), 256 * p.threads));
    const int64_t padded = ceil_div(batch_rows, kMostRows) * kMostRows;
    const Buffer<uint32_t> units(padded * stride);
    const Buffer<Tile> tiles(ceil_div(padded, 6));
    std::vector<double> totals(p.levels.size());
    const Buffer<double> squares(batch_rows * int64_t(p.levels.size()));
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

}  // namespace longcat
