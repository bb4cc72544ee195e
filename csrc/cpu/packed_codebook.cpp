#include "longcat/packed_codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "rvq_kernels.h"

namespace longcat {
namespace {

constexpr uint64_t kMagic = 0x31304b4351565221;
constexpr int64_t kSample = 256;  // codewords whose mean is taken for the centre

// Hands out sections of a buffer, each from a cache line on.
struct Sections {
    char* memory;
    int64_t used = 0;
    template <class T>
    T* next(int64_t count) {
        T* section = reinterpret_cast<T*>(memory + used);
        used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return section;
    }
};

int64_t lay(PackedCodebook& packed, char* memory) {
    const RvqKernels& kernels = rvq_kernels(packed.isa);
    Sections sections{memory};
    const int64_t panels = (packed.entries + kernels.panel_words - 1) / kernels.panel_words;
    packed.padded = panels * kernels.panel_words;
    packed.header = sections.next<PackedCodebook::Header>(1);
    packed.centre = sections.next<float>(packed.dim);
    packed.norm = sections.next<double>(packed.padded);
    packed.start = sections.next<float>(packed.padded);
    packed.slack = sections.next<float>(packed.padded);
    packed.length = sections.next<float>(packed.padded);
    packed.error = sections.next<float>(packed.padded);
    packed.panel_length = sections.next<float>(panels);
    packed.panel_error = sections.next<float>(panels);
    packed.panels = sections.next<uint32_t>(packed.padded * ((packed.dim + kernels.step - 1) / kernels.step));
    return sections.used;
}

}  // namespace

int64_t packed_bytes(int64_t entries, int64_t dim, Isa isa) {
    PackedCodebook packed{};
    packed.isa = isa, packed.entries = entries, packed.dim = dim;
    return lay(packed, nullptr);
}

PackedCodebook packed_view(void* memory, int64_t entries, int64_t dim, Isa isa) {
    PackedCodebook packed{};
    packed.isa = isa, packed.entries = entries, packed.dim = dim;
    lay(packed, static_cast<char*>(memory));
    return packed;
}

bool is_packed(const PackedCodebook& packed) {
    const PackedCodebook::Header& header = *packed.header;
    return header.magic == kMagic && header.entries == packed.entries && header.dim == packed.dim &&
           header.isa == int32_t(packed.isa);
}

void pack_centre(const Codebook& book, const PackedCodebook& packed) {
    const int64_t count = std::min(book.entries, kSample);
    std::vector<double> sum(size_t(packed.dim), 0.0);
    double squares = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float* word = book.words + i * book.entries / count * book.stride;
        double parts[8] = {};  // side by side: one sum would wait for each addition
        int64_t d = 0;
        for (; d + 8 <= packed.dim; d += 8)
            for (int i = 0; i < 8; ++i) parts[i] += double(word[d + i]) * word[d + i];
        for (; d < packed.dim; ++d) parts[0] += double(word[d]) * word[d];
        const double square = std::accumulate(parts, parts + 8, 0.0);
        if (!std::isfinite(square)) continue;
        for (d = 0; d < packed.dim; ++d) sum[size_t(d)] += double(word[d]);
        squares += square, ++used;
    }
    double common = 0;
    for (double& s : sum) s /= double(std::max<int64_t>(1, used)), common += s * s;
    // Worth it only where words share much: a centre that is long beside most words would make the bound of those
    // looser.
    const bool centred = common * double(used) > 0.25 * squares;
    for (int64_t d = 0; d < packed.dim; ++d) packed.centre[d] = centred ? float(sum[size_t(d)]) : 0.0f;
}

PanelPacker::PanelPacker(const Codebook& book, const PackedCodebook& packed)
    : book_(book),
      packed_(packed),
      pitch_((packed.dim / 16 | 1) * 16 + 32),  // an odd number of cache lines: words must not meet in one cache set
      units_(size_t(panel_words(packed.isa) * pitch_)),
      terms_(size_t(tree_terms(packed.dim))) {}

void PanelPacker::pack(int64_t k) {
    const RvqKernels& kernels = rvq_kernels(packed_.isa);
    const int64_t lane = k % kernels.panel_words;
    kernels.pack_word(book_, packed_, k, units_.data() + lane * pitch_, terms_.data());
    if (lane + 1 == kernels.panel_words) kernels.lay_panel(packed_, k - lane, units_.data(), pitch_);
}

int64_t tree_terms(int64_t dim) {
    int64_t half = 1;
    while (half * 2 < dim) half *= 2;
    return half;
}

int panel_words(Isa isa) { return rvq_kernels(isa).panel_words; }

namespace {

// Takes out of the screen the codewords that repeat one before them, which wins every tie: restarted entries may be the
// same row hundreds of times over. Equal codewords have equal norms, so a table of norms finds them.
void drop_repeats(const Codebook& book, const PackedCodebook& packed) {
    constexpr int kProbes = 32;  // different codewords of one norm are rare, and missing a repeat only costs time
    size_t size = 1;
    while (size < 2 * size_t(packed.entries)) size *= 2;
    std::vector<int64_t> table(size, -1);
    for (int64_t k = 0; k < packed.entries; ++k) {
        if (!std::isfinite(packed.norm[k])) continue;
        uint64_t bits;
        std::memcpy(&bits, packed.norm + k, sizeof bits);
        size_t at = size_t(bits * 0x9e3779b97f4a7c15u >> 20) & (size - 1);
        for (int probe = 0; probe < kProbes; ++probe, at = (at + 1) & (size - 1)) {
            const int64_t other = table[at];
            if (other < 0) {
                table[at] = k;
                break;
            }
            if (packed.norm[other] != packed.norm[k]) continue;
            const float *a = book.words + other * book.stride, *b = book.words + k * book.stride;
            if (std::memcmp(a, b, size_t(packed.dim) * sizeof(float)) != 0) continue;
            packed.start[k] = -std::numeric_limits<float>::infinity();
            packed.slack[k] = packed.length[k] = packed.error[k] = 0.0f;
            break;
        }
    }
}

// The sum of a word's squares reads it from eight places at once, which no hardware foresees.
void prefetch_word(const Codebook& book, const PackedCodebook& packed, int64_t k) {
    if (k >= packed.entries) return;
    for (int64_t d = 0; d < packed.dim; d += 16) __builtin_prefetch(book.words + k * book.stride + d);
}

}  // namespace

void finish_packing(const Codebook& book, const PackedCodebook& packed) {
    drop_repeats(book, packed);
    const float longest = *std::max_element(packed.length, packed.length + packed.padded);
    *packed.header = {kMagic, packed.entries, packed.dim, int32_t(packed.isa), !(double(longest) < kLongest)};
}

void pack_codebook(const Codebook& book, const PackedCodebook& packed, [[maybe_unused]] int threads) {
    const int panel = panel_words(packed.isa);
#pragma omp parallel num_threads(threads)
    {
        PanelPacker packer(book, packed);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < packed.padded; first += panel)
            for (int64_t k = first; k < first + panel; ++k) {
                prefetch_word(book, packed, k + 2);
                packer.pack(k);
            }
    }
    finish_packing(book, packed);
}

}  // namespace longcat
