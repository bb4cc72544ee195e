// The launchers and the plain kernels on the emulated device, for ctypes. Every function gives null, or what went
// wrong.
#include "kernels.h"

#include <algorithm>
#include <exception>

#include "cuda/depth_decode_launch.h"
#include "cuda/ema_update_launch.h"
#include "cuda/half_layout.h"
#include "cuda/rvq_decode_launch.h"
#include "cuda/rvq_encode_launch.h"

namespace {

using namespace longcat::cuda;
using longcat::DType;

// A workspace of as many bytes as `run` asks for when given none, filled with 0xff; then `run` with it.
template <class Run>
void with_workspace(Run&& run) {
    std::vector<char> memory(size_t(run(nullptr)) + 256, char(0xff));
    run(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256));
}

template <class Body>
const char* guarded(Body&& body) {
    static std::string message;
    try {
        body();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

}  // namespace

extern "C" {

struct EncodeArguments {
    long rows, dim, row_stride, column_stride, levels;
    const void* x;
    int dtype, residual_dtype;
    const float* const* words;
    const long *entries, *strides;
    const bool* mask;
    void* const* packed;  // one a level, or null
    void* quantized;
    float *residual, *losses;
    long* codes;
    int multiprocessors;
};

const char* emulate_rvq_encode(const EncodeArguments* a) {
    return guarded([&] {
        longcat::RvqEncode p{};
        p.rows = a->rows, p.dim = a->dim, p.x = a->x, p.dtype = DType(a->dtype), p.row_stride = a->row_stride;
        p.column_stride = a->column_stride, p.mask = a->mask, p.residual_dtype = DType(a->residual_dtype);
        p.quantized = a->quantized, p.residual = a->residual, p.losses = a->losses, p.codes = a->codes;
        std::vector<void*> packed;
        for (long level = 0; level < a->levels; ++level) {
            p.levels.push_back({a->words[level], a->entries[level], a->strides[level]});
            if (a->packed != nullptr) packed.push_back(a->packed[level]);
        }
        EmulatedQueue queue(emulated_kernels(), a->multiprocessors);
        with_workspace([&](void* memory) { return longcat::cuda::rvq_encode(queue, p, packed, memory); });
    });
}

const char* emulate_rvq_pack(const float* words, long stride, long entries, long dim, void* packed) {
    return guarded([&] {
        EmulatedQueue queue(emulated_kernels(), 4);
        with_workspace([&](void* memory) { return rvq_pack(queue, words, stride, entries, dim, packed, memory); });
    });
}

const char* emulate_rvq_encode_backward(const EncodeArguments* a, const void* grad, long grad_row_stride,
                                        long grad_column_stride, const float* scales, void* out) {
    return guarded([&] {
        longcat::RvqEncodeBackward p{};
        p.rows = a->rows, p.dim = a->dim, p.dtype = DType(a->dtype), p.residual_dtype = DType(a->residual_dtype);
        p.x = {a->x, a->row_stride, a->column_stride}, p.grad = {grad, grad_row_stride, grad_column_stride};
        p.codes = a->codes, p.scales = scales, p.grad_x = out;
        for (long level = 0; level < a->levels; ++level)
            p.codebooks.push_back({a->words[level], a->entries[level], a->strides[level]});
        EmulatedQueue queue(emulated_kernels(), a->multiprocessors);
        longcat::cuda::rvq_encode_backward(queue, p);
    });
}

const char* emulate_rvq_decode(const EncodeArguments* a, float* out) {
    return guarded([&] {
        longcat::RvqDecode p{{a->codes, a->rows, a->levels, a->row_stride, a->column_stride}, a->dim, {}, 1, {}, out};
        for (long level = 0; level < a->levels; ++level)
            p.codebooks.push_back({a->words[level], a->entries[level], a->strides[level]});
        EmulatedQueue queue(emulated_kernels(), a->multiprocessors);
        longcat::cuda::rvq_decode(queue, p);
    });
}

const char* emulate_rvq_decode_backward(const float* grad, long rows, long dim, long row_stride, const long* codes,
                                        long code_row_stride, long code_level_stride, const long* entries, long levels,
                                        float* const* out) {
    return guarded([&] {
        longcat::RvqDecodeBackward p{};
        p.grad = grad, p.row_stride = row_stride, p.dim = dim;
        p.codes = {codes, rows, levels, code_row_stride, code_level_stride};
        for (long level = 0; level < levels; ++level) p.gradients.push_back({out[level], entries[level]});
        EmulatedQueue queue(emulated_kernels(), 4);
        with_workspace([&](void* memory) { return longcat::cuda::rvq_decode_backward(queue, p, memory); });
    });
}

const char* emulate_ema_update(float* embed, float* embed_ema, float* cluster_size_ema, void* packed,
                               const void* vectors, const long* codes, double decay, double eps,
                               double restart_threshold, double restart_fraction, double restart_count, long seed,
                               long rows, long dim, long entries, long dtype, long row_stride, long* restarted) {
    return guarded([&] {
        longcat::EmaUpdate p{};
        p.rows = rows, p.dim = dim, p.entries = entries, p.vectors = vectors, p.dtype = DType(dtype);
        p.row_stride = row_stride, p.codes = codes, p.decay = decay, p.eps = eps, p.seed = seed;
        p.restart_threshold = restart_threshold, p.restart_fraction = restart_fraction;
        p.restart_count = restart_count, p.embed = embed, p.embed_ema = embed_ema;
        p.cluster_size_ema = cluster_size_ema;
        EmulatedQueue queue(emulated_kernels(), 4);
        with_workspace([&](void* memory) { return longcat::cuda::ema_update(queue, p, packed, restarted, memory); });
    });
}

struct DepthArguments {
    const long *config, *strides;  // of weights: three each
    long config_numbers, weights, rows, dtype, multiprocessors;
    const void *const *weight, *hidden, *start;
    const float* params;
    long params_row, params_level, step_stride, prefix_width, prefix_row, history_rows;
    const long *seeds, *steps, *prefix, *leaders, *history, *offsets;
    const bool* active;
    float *logprobs, *drawn_logprobs, *logits;
    void* embedding;
    long* codes;
    float eps;
};

const char* emulate_depth_decode(const DepthArguments* a) {
    return guarded([&] {
        std::vector<DepthTensor> weights;
        for (long i = 0; i < a->weights; ++i)
            weights.push_back({a->weight[i], {a->strides[3 * i], a->strides[3 * i + 1], a->strides[3 * i + 2]}});
        DepthKernel p = depth_kernel({a->config, a->config + a->config_numbers}, a->eps, weights);
        const auto longs = [](const long* from) { return reinterpret_cast<const i64*>(from); };
        p.rows = int(a->rows), p.type = int(a->dtype), p.hidden_rows = a->hidden, p.start = a->start;
        p.params = a->params, p.params_row = a->params_row, p.params_level = a->params_level;
        p.step_stride = a->step_stride, p.prefix_width = a->prefix_width, p.prefix_row = a->prefix_row;
        p.history_rows = a->history_rows, p.seeds = longs(a->seeds), p.steps = longs(a->steps);
        p.prefix = longs(a->prefix), p.leaders = longs(a->leaders), p.history = longs(a->history);
        p.offsets = longs(a->offsets), p.active = a->active, p.logprobs = a->logprobs;
        p.drawn_logprobs = a->drawn_logprobs, p.logits = a->logits, p.embedding = a->embedding;
        p.codes = reinterpret_cast<i64*>(a->codes);
        EmulatedQueue queue(emulated_kernels(), int(a->multiprocessors));
        with_workspace([&](void* memory) { return longcat::cuda::depth_decode(queue, p, memory); });
    });
}

// For tests of tiles.cuh.
long tile_offset(long row, long chunk) { return long(swizzled(u32(row), u32(chunk))); }

long row_fragment_offset(long row, long k, long lane) { return long(row_fragment(u32(row), u32(k), u32(lane))); }

long word_fragment_offset(long word, long k, long lane) { return long(word_fragment(u32(word), u32(k), u32(lane))); }

unsigned long tile_descriptor(long address) { return wgmma_descriptor(u32(address)); }

long accumulator_place(long group, long half, long i) { return accumulator_index(int(group), int(half), int(i)); }

// row_block, part, first tile and end tile of each unit; the number of units.
long schedule_units(long row_blocks, long parts, long word_tiles, long group, long* out) {
    const Schedule schedule = {int(row_blocks), int(parts), int(word_tiles), int(group)};
    for (int index = 0; out != nullptr && index < schedule.units(); ++index) {
        const Schedule::Unit unit = schedule.unit(index);
        const long values[4] = {unit.row_block, unit.part, unit.first_tile, unit.end_tile};
        std::copy(values, values + 4, out + 4 * index);
    }
    return schedule.units();
}

long screen_parts(long multiprocessors, long major, long rows, long entries) {
    return plan_screen({int(multiprocessors), int(major), 0}, rows, int(entries)).schedule.parts;
}

// Offsets of the sections of a packed codebook, then its size.
void layout_offsets(long entries, long dim, long* out) {
    char* const base = reinterpret_cast<char*>(4096);
    int64_t bytes = 0;
    const Codebook book = codebook_at(nullptr, 0, entries, dim, base, &bytes);
    const void* sections[] = {book.halves, book.norm, book.half, book.length, book.error, book.centre, book.exponent};
    for (const void* section : sections) *out++ = long(static_cast<const char*>(section) - base);
    *out = long(bytes);
}

}  // extern "C"
