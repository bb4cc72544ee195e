// Products of a few rows with matrices that stream through the caches once.
#pragma once

#include <algorithm>
#include <array>

#include "depth_model.h"

namespace longcat {

// Matrices that read the same rows, one after the other.
struct Stage {
    std::array<const DepthMatrix*, 3> matrices{};

    int64_t panel_count(const DepthKernels& kernels) const {
        int64_t count = 0;
        for (const DepthMatrix* m : matrices) count += m == nullptr ? 0 : m->panel_count(kernels);
        return count;
    }

    // Which matrix panel p is of; p becomes its number there.
    int find(const DepthKernels& kernels, int64_t& p) const {
        int i = 0;
        for (; p >= matrices[size_t(i)]->panel_count(kernels); ++i) p -= matrices[size_t(i)]->panel_count(kernels);
        return i;
    }
};

// Elements of products, row after row.
struct DepthRows {
    const char* data;
    int64_t pitch;  // bytes
    int64_t count;
};

// What one thread works with.
struct Worker {
    int number, threads;
    float* sums;     // [rows, a panel's columns]
    uint32_t* half;  // of kChunkBytes: a part of a panel that is not packed

    std::pair<int64_t, int64_t> share(int64_t count) const {
        return {number * count / threads, (number + 1) * count / threads};
    }
};

constexpr int64_t kChunkBytes = 32 << 10;  // of a panel, that stay in the first cache while all rows pass
constexpr int64_t kAheadBytes = 16 << 10;  // from what few rows read to what is brought closer

class Stream {
  public:
    Stream(const DepthKernels& kernels, const GemmKernels& gemm) : kernels_(kernels), gemm_(gemm) {}

    // Calls take(matrix, column, sums) for the worker's panels of `stage`; `next` is the stage that will follow.
    template <class Take>
    void run(const Worker& worker, const Stage& stage, const Stage* next, const DepthRows& rows,
             const Take& take) const {
        const auto [first, last] = worker.share(stage.panel_count(kernels_));
        const int64_t pitch = 2 * kernels_.half_columns;
        for (int64_t p = first; p < last; ++p) {
            int64_t panel = p;
            const int number = stage.find(kernels_, panel);
            const DepthMatrix& m = *stage.matrices[size_t(number)];
            const char* after = p + 1 < last ? nullptr : start_of(worker, next);
            if (m.panels == nullptr)
                unpacked(worker, m, panel, rows);
            else if (rows.count <= kernels_.wide_rows)
                few(worker, m, panel, after, rows);
            else
                many(worker, m, panel, after, rows);
            const int64_t at = panel * pitch, column = panel * m.panel_columns(kernels_);
            take(number, column,
                 DepthSums{worker.sums, pitch, rows.count, std::min(m.panel_columns(kernels_), m.columns - column),
                           m.scale == nullptr ? nullptr : m.scale + at, m.bias == nullptr ? nullptr : m.bias + column});
        }
    }

  private:
    const char* start_of(const Worker& worker, const Stage* stage) const {
        if (stage == nullptr) return nullptr;
        const auto [first, last] = worker.share(stage->panel_count(kernels_));
        if (first == last) return nullptr;
        int64_t panel = first;
        const DepthMatrix& m = *stage->matrices[size_t(stage->find(kernels_, panel))];
        return m.panels == nullptr ? nullptr : m.panels + panel * m.panel_bytes(kernels_);
    }

    // All rows in one tile.
    void few(const Worker& worker, const DepthMatrix& m, int64_t panel, const char* after,
             const DepthRows& rows) const {
        DepthTile t{};
        t.x = rows.data, t.x_pitch = rows.pitch, t.rows = int(rows.count), t.halves = 2;
        t.weights = m.panels + panel * m.panel_bytes(kernels_);
        t.half_pitch = kernels_.row_bytes, t.row_pitch = 2 * kernels_.row_bytes;
        t.steps = m.panel_bytes(kernels_) / t.row_pitch;
        t.sums = worker.sums, t.sums_pitch = 2 * kernels_.half_columns;
        t.ahead = after != nullptr ? after : static_cast<const char*>(t.weights) + kAheadBytes;
        t.ahead_step = t.row_pitch;
        kernels_.product(t);
    }

    // Chunk after chunk, while the next one is on its way.
    void many(const Worker& worker, const DepthMatrix& m, int64_t panel, const char* after,
              const DepthRows& rows) const {
        const int64_t row_pitch = 2 * kernels_.row_bytes, steps = m.panel_bytes(kernels_) / row_pitch;
        const int64_t chunk = kChunkBytes / row_pitch;
        const char* weights = m.panels + panel * m.panel_bytes(kernels_);
        for (int64_t first = 0; first < steps; first += chunk) {
            const int64_t count = std::min(chunk, steps - first);
            const bool is_last = first + count == steps && after != nullptr;
            const char* here = weights + first * row_pitch;
            for (int half = 0; half < 2; ++half) {
                DepthTile t{};
                t.weights = here + half * kernels_.row_bytes, t.row_pitch = row_pitch, t.steps = count;
                t.ahead = is_last ? after : here + count * row_pitch;
                tiles(worker, t, half, first, rows);
            }
        }
    }

    // All rows by a part of half a panel.
    void tiles(const Worker& worker, DepthTile t, int half, int64_t first, const DepthRows& rows) const {
        const int64_t count = ceil_div(rows.count, kernels_.tile_rows), bytes = t.steps * 2 * kernels_.row_bytes;
        const int64_t begin = first * kernels_.row_depth / kernels_.step * 4;
        const char* ahead = t.ahead;
        t.halves = 1, t.x_pitch = rows.pitch, t.sums_pitch = 2 * kernels_.half_columns, t.go_on = first > 0;
        t.ahead_step = kernels_.row_bytes / count;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i * rows.count / count;
            t.rows = int((i + 1) * rows.count / count - row);
            t.x = rows.data + row * rows.pitch + begin;
            t.sums = worker.sums + row * t.sums_pitch + half * kernels_.half_columns;
            t.ahead = ahead + (half * count + i) * bytes / (2 * count);
            kernels_.product(t);
        }
    }

    // Of a matrix that is not packed: in registers for a few rows, else chunk by chunk.
    void unpacked(const Worker& worker, const DepthMatrix& m, int64_t panel, const DepthRows& rows) const {
        const int64_t pitch = 2 * kernels_.half_columns;
        for (int half = 0; half < 2; ++half) {
            const HalfPanel part = half_panel(gemm_, m, panel, half);
            if (part.halves.count[0] == 0) continue;
            if (rows.count <= std::min(kFewRows, gemm_.tile_rows)) {
                const auto* units = reinterpret_cast<const uint32_t*>(rows.data);
                gemm_.stream({units, rows.pitch / 4, false, int(rows.count)}, part.lines, part.halves, m.depth,
                             worker.sums + half * kernels_.half_columns, pitch, false);
            } else {
                chunks(worker, m, part, half, rows);
            }
        }
    }

    void chunks(const Worker& worker, const DepthMatrix& m, const HalfPanel& part, int half,
                const DepthRows& rows) const {
        const int64_t chunk = kChunkBytes / kernels_.row_bytes, steps = ceil_div(m.depth, kernels_.row_depth);
        for (int64_t first = 0; first < steps; first += chunk) {
            const int64_t count = std::min(chunk, steps - first), begin = first * kernels_.row_depth;
            const int64_t depth = std::min(count * kernels_.row_depth, m.depth - begin);
            gemm_.pack_columns(part.from(begin), part.halves, depth, worker.half);
            DepthTile t{};
            t.weights = worker.half, t.row_pitch = kernels_.row_bytes, t.steps = count;
            t.ahead = reinterpret_cast<const char*>(worker.half);
            tiles(worker, t, half, first, rows);
        }
    }

    const DepthKernels& kernels_;
    const GemmKernels& gemm_;
};

}  // namespace longcat
