#include "longcat/ema_update.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "buffer.h"
#include "double_lanes.h"
#include "segments.h"

namespace longcat {
namespace {

constexpr int64_t kRun = 32;  // entries that one thread writes in turn, a multiple of every panel
constexpr int kAhead = 4;     // from a row that is added to the one that is sent for meanwhile

template <class T>
const T* vector_of(const EmaUpdate& p, int64_t row) {
    return static_cast<const T*>(p.vectors) + row * p.row_stride;
}

using MoveEntry = void (*)(const EmaUpdate&, const Segments& rows, int64_t k, double inverse_size, double* room);

}  // namespace
}  // namespace longcat

#define LC_BODY "ema_update_body.h"
#include "each_isa.h"

namespace longcat {
namespace {

struct Kernels {
    MoveEntry (*move_entry_of)(DType);
    void (*invert_sizes)(const EmaUpdate&, double total, double smoothed, double* inverse_size);
};

Kernels kernels_for(Isa isa) {
#if LC_X86
    if (isa == Isa::avx512 || isa == Isa::avx512_bf16) return {avx512::move_entry_of, avx512::invert_sizes};
    if (isa == Isa::avx2) return {avx2::move_entry_of, avx2::invert_sizes};
#endif
    (void)isa;
    return {portable::move_entry_of, portable::invert_sizes};
}

uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Sorts by the upper 32 bits, a byte a pass.
void sort_by_key(std::vector<uint64_t>& items) {
    std::vector<uint64_t> sorted(items.size());
    for (int shift = 32; shift < 64; shift += 8) {
        size_t starts[257] = {};
        for (const uint64_t item : items) ++starts[(item >> shift & 255) + 1];
        for (int byte = 0; byte < 256; ++byte) starts[byte + 1] += starts[byte];
        for (const uint64_t item : items) sorted[starts[item >> shift & 255]++] = item;
        items.swap(sorted);
    }
}

// Row numbers in the order in which restarted entries take them.
std::vector<int64_t> restart_rows(const EmaUpdate& p) {
    const auto seed = uint64_t(p.seed);
    const uint32_t key = mix(mix(uint32_t(seed)) ^ uint32_t(seed >> 32) ^ 0x9e3779b9u);
    std::vector<uint64_t> keyed;
    for (int64_t i = 0; i < p.rows; ++i)
        if (p.codes[i] >= 0) keyed.push_back(uint64_t(mix(mix(uint32_t(i)) ^ key)) << 32 | uint32_t(i));
    sort_by_key(keyed);
    std::vector<int64_t> rows;
    for (const uint64_t item : keyed) rows.push_back(int64_t(uint32_t(item)));
    return rows;
}

// What is decided before any codeword moves.
struct Plan {
    double restart_count;
    int64_t restarted = 0;
    Buffer<double> inverse_size;       // of each entry: makes its moving sum a codeword; 0: the codeword stays
    std::vector<int64_t> restart_row;  // of each entry; empty where none restarts

    // Moves the counts.
    Plan(const EmaUpdate& p, const Segments& rows) : inverse_size(p.entries) {
        double total = 0;
        for (int64_t k = 0; k < p.entries; ++k) {
            float& size = p.cluster_size_ema[k];
            size = float(p.decay * double(size) + (1 - p.decay) * double(rows.size(k)));
            total += double(size);
        }
        const double smoothed = total + double(p.entries) * p.eps, mean = total / double(p.entries);
        kernels_for(p.isa).invert_sizes(p, total, smoothed, inverse_size.data());
        restart_count = p.restart_count > 0 ? p.restart_count : double(float(mean));
        const double relative = p.restart_fraction * mean;  // NaN where a count is: nothing is below that
        if (!rows.order.empty()) choose_rows(p, relative <= p.restart_threshold ? p.restart_threshold : relative);
    }

    // The row from which entry k restarts; -1: it goes on.
    int64_t row(int64_t k) const { return restart_row.empty() ? -1 : restart_row[size_t(k)]; }

  private:
    void choose_rows(const EmaUpdate& p, double threshold) {
        const auto below = [&](float size) { return double(size) < threshold; };
        restarted = std::count_if(p.cluster_size_ema, p.cluster_size_ema + p.entries, below);
        if (restarted == 0) return;
        const std::vector<int64_t> rows = restart_rows(p);
        restart_row.assign(size_t(p.entries), -1);
        size_t next = 0;
        for (int64_t k = 0; k < p.entries; ++k)
            if (below(p.cluster_size_ema[k])) restart_row[size_t(k)] = rows[next++ % rows.size()];
    }
};

template <class T>
void restart_entry(const EmaUpdate& p, int64_t k, int64_t row, double count) {
    const T* vector = vector_of<T>(p, row);
    for (int64_t d = 0; d < p.dim; ++d) {
        const float value = to_float(vector[d]);
        p.embed[k * p.dim + d] = value;
        p.embed_ema[k * p.dim + d] = float(double(value) * count);
    }
    p.cluster_size_ema[k] = float(count);
}

// Packing the entries between them hides from the hardware that they are read one after another.
void send_for_entry(const EmaUpdate& p, int64_t k) {
    if (k >= p.entries) return;
    for (int64_t d = 0; d < p.dim; d += 16) {
        __builtin_prefetch(p.embed_ema + k * p.dim + d, 1);
        __builtin_prefetch(p.embed + k * p.dim + d, 1);
    }
}

// Writes entries [first, first + kRun) and packs them.
void write_run(const EmaUpdate& p, const Segments& rows, const Plan& plan, int64_t first, double* sum,
               std::optional<PanelPacker>& packer) {
    const MoveEntry move_entry = kernels_for(p.isa).move_entry_of(p.dtype);
    const int64_t last = std::min(first + kRun, p.entries);
    for (int64_t k = first; k < last; ++k) {
        const int64_t row = plan.row(k);
        if (row < 0)
            move_entry(p, rows, k, plan.inverse_size.data()[k], sum);
        else
            dispatch_float(p.dtype, "ema_update: vectors",
                           [&](auto type) { restart_entry<decltype(type)>(p, k, row, plan.restart_count); });
        if (!packer) continue;
        send_for_entry(p, k + 1);
        packer->pack(k);
    }
    if (packer && last == p.entries)
        for (int64_t k = last; k < p.packed->padded; ++k) packer->pack(k);
}

// Writes the packed form's centre before the codewords move: from a sample of where they will be, near enough.
void choose_centre(const EmaUpdate& p, const Segments& rows, const Plan& plan) {
    const int64_t count = std::min<int64_t>(p.entries, 256);
    std::vector<float> sample(size_t(count * p.dim));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t k = i * p.entries / count;
        int64_t row = plan.row(k);
        if (row < 0 && p.decay < 0.5 && rows.begin(k) != rows.end(k)) row = *rows.begin(k);
        float* word = sample.data() + i * p.dim;
        if (row < 0)
            std::copy(p.embed + k * p.dim, p.embed + (k + 1) * p.dim, word);
        else
            dispatch_float(p.dtype, "ema_update: vectors", [&](auto type) {
                const auto* vector = vector_of<decltype(type)>(p, row);
                for (int64_t d = 0; d < p.dim; ++d) word[d] = to_float(vector[d]);
            });
    }
    pack_centre({sample.data(), count, p.dim}, *p.packed);
}

}  // namespace

int64_t ema_update(const EmaUpdate& p) {
    const Segments rows("ema_update: codes", p.codes, 1, p.rows, p.entries);
    const Plan plan(p, rows);
    const Codebook book{p.embed, p.entries, p.dim};
    if (p.packed) choose_centre(p, rows, plan);
#pragma omp parallel num_threads(p.threads)
    {
        const Buffer<double> sum(p.dim);
        std::optional<PanelPacker> packer;
        if (p.packed) packer.emplace(book, *p.packed);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < p.entries; first += kRun) write_run(p, rows, plan, first, sum.data(), packer);
    }
    if (p.packed) finish_packing(book, *p.packed);
    return plan.restarted;
}

}  // namespace longcat
