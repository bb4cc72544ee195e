// Products of groups by the kernels of gemm_kernels.h: blocks of rows, panels of columns, tiles, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "gemm_kernels.h"

namespace longcat {

constexpr int64_t kBlockUnits = (3 << 20) / 4;  // of rows that pass each panel together: what the last cache keeps

// The rows of one product.
struct Left {
    int64_t rows, depth;
    Lines lines;
    bool by_depth;  // lines are steps of depth, not rows
    const uint32_t* units = nullptr;
    int64_t pitch = 0;  // with `units`: rows that are packed already

    int64_t block_rows(const GemmKernels& kernels) const {
        const int64_t fits = kBlockUnits / std::max<int64_t>(1, ceil_div(depth, kernels.step));
        return std::min(rows, std::max<int64_t>(fits / kernels.tile_rows, 1) * kernels.tile_rows);
    }

    // Units of memory for a block.
    int64_t block_units(const GemmKernels& kernels) const {
        const int64_t block = block_rows(kernels), units = ceil_div(depth, kernels.step);
        return by_depth ? units * odd_pitch(block) : block * odd_pitch(units);
    }
};

// Units of memory for the largest block of any group; `left(group)` gives its rows, which may be packed already.
template <class LeftOf>
int64_t most_block_units(const GemmKernels& kernels, int64_t groups, const LeftOf& left) {
    int64_t most = 0;
    for (int64_t group = 0; group < groups; ++group) {
        const Left one = left(group);
        if (one.units == nullptr) most = std::max(most, one.block_units(kernels));
    }
    return most;
}

// Panels of one group, for one thread.
struct Share {
    int64_t group, first_panel, last_panel;
};

// Groups of `panels(group)` panels, in parts for `threads` threads.
template <class Panels>
std::vector<Share> shares(int64_t groups, int threads, const Panels& panels) {
    std::vector<Share> parts;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t count = panels(group), pieces = std::min<int64_t>(count, threads);
        for (int64_t i = 0; i < pieces; ++i) parts.push_back({group, i * count / pieces, (i + 1) * count / pieces});
    }
    return parts;
}

// Calls body(thread, item) for all items, each thread taking the next one that is left.
template <class Body>
void take_turns(int threads, int64_t items, const Body& body) {
    std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
        for (int64_t i = next++; i < items; i = next++) body(t, i);
}

// Where a tile begins, and its rows.
struct Place {
    int64_t panel, row, rows;
};

// A panel of the other side: where its columns lie, as lines or, `by_depth`, across them; or packed already.
struct Panel {
    Lines lines;
    Halves halves;
    int64_t depth;
    bool by_depth = false;
    const uint32_t* units = nullptr;
};

// One thread's memory: of panels the one that is multiplied and the one that is packed meanwhile, if any.
struct Room {
    Buffer<uint32_t> rows, panel, next_panel;
    Buffer<float> tile;
    Panel next;  // what is in `next_panel`; its data may be null
    Room(int64_t row_units, int64_t panel_units)
        : rows(row_units),
          panel(panel_units),
          next_panel(panel_units),
          tile(kMostTileRows * kMostPanelColumns),
          next{} {}
};

inline std::vector<Room> rooms_for(int threads, int64_t row_units, int64_t panel_units) {
    std::vector<Room> rooms;
    for (int t = 0; t < threads; ++t) rooms.emplace_back(row_units, panel_units);
    return rooms;
}

// The columns of panel p of `columns`.
inline Halves halves_of(const GemmKernels& kernels, int64_t columns, int64_t p) {
    const int64_t width = kernels.panel_columns / 2, first = p * kernels.panel_columns;
    const auto count = [&](int64_t from) { return std::clamp<int64_t>(columns - from, 0, width); };
    return {{first, first + width}, {count(first), count(first + width)}};
}

inline void pack(const GemmKernels& kernels, const Panel& panel, uint32_t* out) {
    if (!panel.by_depth) return kernels.pack_columns(panel.lines, panel.halves, panel.depth, out);
    const int64_t width = kernels.panel_columns / 2;
    for (int h = 0; h < 2; ++h)
        kernels.pack_steps(panel.lines, panel.depth, panel.halves.count[h] ? panel.halves.first[h] : 0,
                           panel.halves.count[h], width, out + h * width, kernels.panel_columns);
}

// What tile i of `tiles` asks for of a panel: the first tiles of one half of it, the others of the other.
inline Ahead ahead_of(const GemmKernels& kernels, const Panel& panel, int64_t i, int64_t tiles) {
    const int64_t first_tiles = (tiles + 1) / 2, h = i < first_tiles ? 0 : 1, size = bytes_of(panel.lines.dtype);
    const int64_t part = h == 0 ? i : i - first_tiles, parts = h == 0 ? first_tiles : tiles - first_tiles;
    const int64_t stride = panel.lines.stride * size, first = panel.halves.first[h], count = panel.halves.count[h];
    const char* data = static_cast<const char*>(panel.lines.data);
    Ahead ahead{};
    if (panel.units != nullptr) {
        ahead.count = ceil_div(panel.depth, kernels.step) * kernels.panel_columns / 2 * 4 / kLine, ahead.step = kLine;
        ahead.from = reinterpret_cast<const char*>(panel.units) + h * ahead.count * kLine;
    } else if (panel.lines.index != nullptr || count == 0) {
        return ahead;
    } else if (panel.by_depth) {
        ahead = {data + first * size, stride, panel.depth};
    } else if (panel.lines.stride == panel.depth) {
        ahead = {data + first * stride, kLine, ceil_div(count * stride, kLine)};
    }
    const int64_t start = part * ahead.count / parts;
    return {ahead.from + start * ahead.step, ahead.step, (part + 1) * ahead.count / parts - start};
}

// Units of a panel: those that were packed before, or meanwhile, or are now.
inline const uint32_t* packed_panel(const GemmKernels& kernels, const Panel& panel, Room& room) {
    if (panel.units != nullptr) return panel.units;
    const Panel& next = room.next;
    if (next.lines.data == panel.lines.data && next.halves.first[0] == panel.halves.first[0] &&
        next.depth == panel.depth)
        std::swap(room.panel, room.next_panel);
    else
        pack(kernels, panel, room.panel.data());
    room.next = {};
    return room.panel.data();
}

// Whether products can pack this panel meanwhile: its lines hold units, and all of them.
inline bool in_pieces(const GemmKernels& kernels, const Panel& panel) {
    const int64_t width = kernels.panel_columns / 2;
    return panel.units == nullptr && !panel.by_depth && panel.lines.index == nullptr &&
           kernels.step * bytes_of(panel.lines.dtype) == 4 && panel.depth % (4 * kernels.step) == 0 &&
           panel.halves.count[0] == width && panel.halves.count[1] == width;
}

// The pieces of the first of so many tiles.
inline Pieces first_pieces(const Panel& panel, const Panel& after, int64_t units, int64_t tiles, uint32_t* out) {
    Pieces pieces{};
    pieces.stride = panel.lines.stride * bytes_of(panel.lines.dtype), pieces.panel = out;
    for (int h = 0; h < 2; ++h) {
        pieces.lines[h] = static_cast<const char*>(panel.lines.data) + panel.halves.first[h] * pieces.stride;
        pieces.after[h] = static_cast<const char*>(after.lines.data) + after.halves.first[h] * pieces.stride;
    }
    pieces.last = ceil_div(units / 2, tiles), pieces.every = units / std::max<int64_t>(pieces.last, 1);
    return pieces;
}

// To those of the next tile, of so many in all.
inline void go_on(Pieces& pieces, int64_t all) {
    const int64_t count = pieces.last - pieces.first;
    pieces.first = pieces.last, pieces.last = std::min(pieces.last + count, all);
}

// Multiplies the rows with panels [first, last): `panel(p)` gives panel p, and for `last` what will be read next;
// `target(place, tile, pitch)` where a tile's sums go, `tile` itself or elsewhere, and with `add` go on from what is
// there; `take(place, sums)` uses them.
template <class PanelOf, class Target, class Take>
void multiply(const GemmKernels& kernels, const Left& left, int64_t first, int64_t last, Room& room,
              const PanelOf& panel, const Target& target, const Take& take, bool add = false) {
    const int64_t units = ceil_div(left.depth, kernels.step);
    const int64_t block = left.units == nullptr ? left.block_rows(kernels) : std::max<int64_t>(left.rows, 1);
    const bool few = left.rows <= std::min(kFewRows, kernels.tile_rows) && !left.by_depth;
    for (int64_t start = 0; start < left.rows; start += block) {
        const int64_t rows = std::min(block, left.rows - start);
        TileRows tile{left.units, left.pitch, left.by_depth, 0};
        if (left.units == nullptr) {
            tile.units = room.rows.data(), tile.pitch = odd_pitch(left.by_depth ? rows : units);
            if (left.by_depth)
                kernels.pack_steps(left.lines, left.depth, start, rows, rows, room.rows.data(), tile.pitch);
            else
                kernels.pack_rows(left.lines, start, rows, left.depth, room.rows.data(), tile.pitch);
        }
        const uint32_t* base = tile.units;
        const int64_t tiles = ceil_div(rows, kernels.tile_rows);
        const int64_t each = rows / tiles, larger = rows % tiles;
        const bool more = start + rows < left.rows;
        const auto panel_at = [&](int64_t p) { return panel(p >= last && more ? p - last + first : p); };
        for (int64_t p = first; p < last; ++p) {
            const Panel columns = panel(p), next = panel_at(p + 1);
            const bool streams = few && !columns.by_depth && columns.units == nullptr;
            const uint32_t* packed = streams ? nullptr : packed_panel(kernels, columns, room);
            const bool packs = !streams && !left.by_depth && next.depth == left.depth && in_pieces(kernels, next);
            Pieces pieces{};
            if (packs) {
                pieces = first_pieces(next, panel_at(p + 2), units, tiles, room.next_panel.data());
                room.next = next;
            }
            for (int64_t i = 0, row = 0; i < tiles; ++i, row += tile.count) {
                tile.count = int(each + (i < larger));
                tile.units = base + row * (left.by_depth ? 1 : tile.pitch);
                const Place place{p, start + row, tile.count};
                int64_t pitch = kernels.panel_columns;
                float* sums = target(place, room.tile.data(), pitch);
                if (streams) {
                    kernels.stream(tile, columns.lines, columns.halves, left.depth, sums, pitch, add);
                } else if (packs) {
                    kernels.packing_product(tile, packed, units, pieces, sums, pitch, add);
                    go_on(pieces, units / 2);
                } else {
                    kernels.product(tile, packed, units, ahead_of(kernels, next, i, tiles), sums, pitch, add);
                }
                take(place, sums);
            }
        }
    }
}

}  // namespace longcat
