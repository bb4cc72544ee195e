#include "cuda/rvq_encode_launch.h"

#include <algorithm>

#include "cuda/half_layout.h"

namespace longcat::cuda {
namespace {

constexpr int64_t kWidest = 65536;  // of a row: depth of the exact sums' stack

int type_of(DType dtype) {
    LC_CHECK(is_float(dtype), "rvq_encode: dtypes must be float32, bfloat16 or float16");
    return int(dtype);
}
static_assert(int(DType::float32) == kFloat32 && int(DType::bfloat16) == kBFloat16 && int(DType::float16) == kFloat16);

// Memory of one call: rows between levels, candidates, and up to two codebooks packed on the way.
struct Workspace {
    Rows rows{};
    Nearest* nearest = nullptr;
    double* squares = nullptr;
    PackScratch pack;
    char* books[2] = {};

    Workspace(Arena& arena, const Device& device, const longcat::RvqEncode& p, bool packs)
        : pack(arena, packs ? largest(p) : 0, p.dim) {
        const int64_t columns = rounded_up(p.dim, kLayoutColumns);
        rows = {p.rows, int(p.dim), int(columns), p.residual, nullptr, nullptr, nullptr};
        rows.halves = arena.take<u16>(p.rows * columns);
        rows.bounds = arena.take<RowBound>(p.rows);
        rows.kinds = arena.take<u8>(p.rows);
        int64_t lists = 0;
        for (const auto& level : p.levels) {
            const ScreenPlan plan = plan_screen(device, p.rows, int(level.entries));
            lists = std::max<int64_t>(lists, int64_t(plan.lists) * plan.schedule.parts);
        }
        nearest = arena.take<Nearest>(lists * p.rows);
        squares = arena.take<double>(int64_t(p.levels.size()) * p.rows);
        for (char*& book : books) {
            int64_t bytes = 0;
            codebook_at(nullptr, 0, packs ? largest(p) : 1, p.dim, nullptr, &bytes);
            book = arena.take<char>(packs ? bytes : 0);
        }
    }

    static int64_t largest(const longcat::RvqEncode& p) {
        int64_t entries = 1;
        for (const auto& level : p.levels) entries = std::max(entries, level.entries);
        return entries;
    }
};

void screen(Queue& queue, const Workspace& work, const Codebook& book, const ScreenPlan& plan) {
    RvqCoarse coarse = {};
    coarse.rows = work.rows, coarse.book = book, coarse.schedule = plan.schedule, coarse.nearest = work.nearest;
    if (plan.launch.threads == kWgmmaThreads) {
        coarse.row_map = queue.tensor_map(work.rows.halves, work.rows.count, work.rows.columns, kTileRows);
        coarse.word_map = queue.tensor_map(book.halves, book.padded_entries, book.columns, kTileWords / 2);
    }
    queue.run(plan.launch, coarse);
}

void finish_level(Queue& queue, const longcat::RvqEncode& p, const Workspace& work, const Codebook& book,
                  const Codebook* next, const ScreenPlan& plan, int level) {
    RvqFinish finish = {};
    finish.rows = work.rows, finish.book = book, finish.next = next == nullptr ? book : *next;
    finish.is_last = next == nullptr, finish.schedule = plan.schedule, finish.lists = plan.lists;
    finish.nearest = work.nearest, finish.residual_type = type_of(p.residual_dtype), finish.level = level;
    finish.levels = int(p.levels.size()), finish.codes = reinterpret_cast<i64*>(p.codes);
    finish.squares = work.squares + level * p.rows;
    queue.run({"rvq_finish", blocks_of(p.rows, 1), 1, kRowThreads}, finish);
}

void prepare(Queue& queue, const longcat::RvqEncode& p, const Workspace& work, const Codebook& book) {
    const RvqPrepare prepare = {work.rows,       book,  p.x, type_of(p.dtype), type_of(p.residual_dtype), p.row_stride,
                                p.column_stride, p.mask};
    queue.run({"rvq_prepare", blocks_of(p.rows, 1), 1, kRowThreads}, prepare);
}

template <class Params, class Books>
void name_books(Params& params, const Books& books) {
    LC_CHECK(books.size() <= size_t(kMostLevels), "rvq_encode: there must be at most 32 levels");
    params.levels = int(books.size());
    for (size_t level = 0; level < books.size(); ++level)
        params.books[level] = {books[level].words, books[level].stride, int(books[level].entries)};
}

void sum_up(Queue& queue, const longcat::RvqEncode& p, const Workspace& work) {
    const int levels = int(p.levels.size());
    const RvqLosses losses = {p.rows, int(p.dim), levels, work.squares, work.rows.kinds, p.losses};
    queue.run({"rvq_losses", unsigned(levels), 1, kRowThreads}, losses);
    RvqGather gather = {};
    name_books(gather, p.levels);
    gather.rows = p.rows, gather.dim = int(p.dim), gather.type = type_of(p.dtype), gather.out = p.quantized;
    gather.codes = reinterpret_cast<const i64*>(p.codes), gather.row_stride = levels, gather.level_stride = 1;
    queue.run({"rvq_gather", blocks_of(p.rows, 1), blocks_of(p.dim, kGatherThreads), kGatherThreads}, gather);
}

}  // namespace

void pack(Queue& queue, const Codebook& book, const PackScratch& scratch) {
    LC_CHECK(book.dim <= kWidest, "rvq_encode: a packed codebook must have at most 65536 columns");
    const RvqPack p = {book, scratch.chunks, scratch.sums, scratch.largest};
    const unsigned warps = kPackThreads / 32, rows = blocks_of(book.padded_entries, warps);
    queue.zero(scratch.largest, sizeof *scratch.largest);
    queue.run({"rvq_pack_norm", rows, 1, kPackThreads}, p);
    queue.run({"rvq_pack_sum", blocks_of(book.dim + 1, kPackThreads), unsigned(scratch.chunks), kPackThreads}, p);
    queue.run({"rvq_pack_centre", blocks_of(book.dim, kPackThreads), 1, kPackThreads}, p);
    queue.run({"rvq_pack_words", rows, 1, kPackThreads}, p);
}

ScreenPlan plan_screen(const Device& device, int64_t rows, int entries) {
    const int tiles = rounded_up(entries, kTileWords) / kTileWords, fewest = 4;
    const bool hopper = device.major == 9;
    const int block_rows = hopper ? int(kWgmmaCluster) * kTileRows : kTileRows;
    const int workers = std::max(1, hopper ? device.multiprocessors / int(kWgmmaCluster) : device.multiprocessors);
    const int row_blocks = int(blocks_of(std::max<int64_t>(rows, 1), block_rows));
    // 4096 rows of 4096 float16 elements are 32 MB: they stay in the level-two cache while the codebook passes by.
    const Schedule schedule = {row_blocks, best_parts(row_blocks, tiles, workers, fewest), tiles, 4096 / block_rows};
    const unsigned units = unsigned(schedule.units());
    if (hopper)
        return {1,
                {"rvq_coarse_wgmma", kWgmmaCluster * std::min(units, unsigned(workers)), 1, kWgmmaThreads,
                 kWgmmaSharedBytes},
                schedule};
    if (device.major >= 8)
        return {int(kMmaLists), {"rvq_coarse_mma", units, 1, kMmaThreads, kMmaSharedBytes}, schedule};
    return {1, {"rvq_coarse_plain", units, 1, kPlainThreads}, schedule};
}

int64_t rvq_encode(Queue& queue, const longcat::RvqEncode& p, const std::vector<void*>& packed, void* workspace) {
    LC_CHECK(p.dim <= kWidest, "rvq_encode: rows must have at most 65536 elements");
    Arena arena(workspace);
    const Workspace work(arena, queue.device(), p, packed.empty());
    if (workspace == nullptr) return arena.used();
    const size_t levels = p.levels.size();
    LC_CHECK(packed.empty() || packed.size() == levels, "rvq_encode: packed must have one codebook a level, or none");
    std::vector<Codebook> books;
    // Two places take turns: while a level is finished, the next one's codebook is there too.
    const auto add_book = [&](size_t level) {
        const auto& source = p.levels[level];
        if (packed.empty() && level > 0 && source == p.levels[level - 1]) return books.push_back(books.back());
        const bool first_taken = level > 0 && static_cast<void*>(books.back().halves) == work.books[0];
        void* place = packed.empty() ? work.books[first_taken ? 1 : 0] : packed[level];
        books.push_back(codebook_at(source.words, source.stride, source.entries, p.dim, place));
        if (packed.empty()) pack(queue, books.back(), work.pack);
    };
    add_book(0);
    prepare(queue, p, work, books[0]);
    for (size_t level = 0; level < levels; ++level) {
        const ScreenPlan plan = plan_screen(queue.device(), p.rows, int(p.levels[level].entries));
        if (p.rows > 0) screen(queue, work, books[level], plan);
        if (level + 1 < levels) add_book(level + 1);
        finish_level(queue, p, work, books[level], level + 1 < levels ? &books[level + 1] : nullptr, plan, int(level));
    }
    sum_up(queue, p, work);
    return arena.used();
}

int64_t rvq_pack(Queue& queue, const float* words, int64_t stride, int64_t entries, int64_t dim, void* packed,
                 void* workspace) {
    Arena arena(workspace);
    const PackScratch scratch(arena, entries, dim);
    if (workspace != nullptr) pack(queue, codebook_at(words, stride, entries, dim, packed), scratch);
    return arena.used();
}

void rvq_encode_backward(Queue& queue, const longcat::RvqEncodeBackward& p) {
    RvqBackward backward = {};
    name_books(backward, p.codebooks);
    backward.rows = p.rows, backward.dim = int(p.dim), backward.type = type_of(p.dtype);
    backward.residual_type = type_of(p.residual_dtype);
    backward.x = {p.x.data, p.x.row_stride, p.x.column_stride};
    backward.grad = {p.grad.data, p.grad.row_stride, p.grad.column_stride};
    backward.codes = reinterpret_cast<const i64*>(p.codes), backward.scales = p.scales, backward.out = p.grad_x;
    queue.run({"rvq_backward", blocks_of(p.rows, 1), blocks_of(p.dim, kGatherThreads), kGatherThreads}, backward);
}

}  // namespace longcat::cuda
