#include "longcat/ngram_embedding.h"

#include "gemm.h"

namespace longcat {
namespace {

constexpr int64_t kSpanPanels = 4;  // of columns that are finished together

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

bool is_live(const NgramEmbedding& p, int64_t t) {
    const int64_t tables = int64_t(p.tables.size()), *hashes = p.hashes + t * tables;
    return std::any_of(hashes, hashes + tables, [](int64_t n) { return n != 0; });
}

// Where the looked-up rows of one table lie in a block, as units.
struct Part {
    int64_t first, units, pitch;
};

// Live tokens whose looked-up rows are multiplied together: all rows of a table, then those of the next.
struct Block {
    const int64_t* tokens;
    int64_t count;
    const uint32_t* units;
    const std::vector<Part>& parts;

    Left left(const NgramEmbedding& p, size_t table) const {
        const Part& part = parts[table];
        return {count, p.tables[table].rows.width, {}, false, units + count * part.first, part.pitch};
    }
};

std::vector<Part> parts_of(const NgramEmbedding& p, const GemmKernels& kernels) {
    std::vector<Part> parts;
    int64_t first = 0;
    for (const auto& table : p.tables) {
        const int64_t units = ceil_div(table.rows.width, kernels.step);
        parts.push_back({first, units, odd_pitch(units)});
        first += parts.back().pitch;
    }
    return parts;
}

// Puts the table rows of one live token in their places.
void look_up(const NgramEmbedding& p, const GemmKernels& kernels, const Block& block, int64_t row, uint32_t* units) {
    for (size_t i = 0; i < p.tables.size(); ++i) {
        const Part& part = block.parts[i];
        const auto& table = p.tables[i].rows;
        const int64_t hash = p.hashes[block.tokens[row] * int64_t(p.tables.size()) + int64_t(i)];
        uint32_t* out = units + block.count * part.first + row * part.pitch;
        if (hash == 0)
            std::fill(out, out + part.units, 0u);
        else
            kernels.pack_rows({table.data, p.dtype, table.stride}, hash, 1, table.width, out, part.pitch);
    }
}

// Writes columns [column, column + count) of token t; `sums`: of its lookups, null for a token that is not live.
void write(const NgramEmbedding& p, const GemmKernels& kernels, int64_t t, int64_t column, int64_t count,
           const float* sums, float* room) {
    const int64_t id = p.ids.at(t / p.length, t % p.length), size = bytes_of(p.dtype);
    const float share = p.rule.ignores(id) ? 1.0f : float(1.0 / double(1 + p.tables.size()));
    std::fill(room, room + count, 0.0f);
    if (sums != nullptr) kernels.add_scaled(sums, DType::float32, share, count, room);
    const char* word = static_cast<const char*>(p.word.data) + (id * p.word.stride + column) * size;
    if (id >= 0) kernels.add_scaled(word, p.dtype, share, count, room);
    kernels.store(room, count, 1, count, static_cast<char*>(p.out) + (t * p.dim + column) * size, p.dtype, count,
                  false);
}

// One thread's memory beside that for a panel.
struct Sums {
    Buffer<float> all, one;
};

void embed_span(const NgramEmbedding& p, const GemmKernels& kernels, const Block& block, int64_t first, int64_t last,
                Room& room, const Sums& sums) {
    const int64_t width = kernels.panel_columns, pitch = kSpanPanels * width;
    for (int64_t at = first; at < last; ++at)
        for (size_t i = 0; i < p.tables.size(); ++i) {
            const auto panel = [&](int64_t wanted) {  // the one after: of the next table, or of the first again
                const size_t table = (i + size_t(wanted > at)) % p.tables.size();
                const auto& projection = p.tables[table].projection;
                return Panel{{projection.data, p.dtype, projection.stride},
                             halves_of(kernels, p.dim, table < i ? wanted : at),
                             p.tables[table].rows.width};
            };
            const auto target = [&](const Place& place, float*, int64_t& out_pitch) {
                out_pitch = pitch;
                return sums.all.data() + place.row * pitch + (at - first) * width;
            };
            multiply(
                kernels, block.left(p, i), at, at + 1, room, panel, target, [](const Place&, const float*) {}, i > 0);
        }
    const int64_t column = first * width, count = std::min(last * width, p.dim) - column;
    for (int64_t row = 0; row < block.count; ++row)
        write(p, kernels, block.tokens[row], column, count, sums.all.data() + row * pitch, sums.one.data());
}

void embed(const NgramEmbedding& p) {
    const GemmKernels& kernels = gemm_kernels(p.isa, p.dtype);
    const std::vector<Part> parts = parts_of(p, kernels);
    const int64_t tokens = p.batch * p.length, row_units = parts.back().first + parts.back().pitch;
    const int64_t panels = ceil_div(p.dim, kernels.panel_columns), spans = ceil_div(panels, kSpanPanels);
    std::vector<int64_t> live;
    const Buffer<float> whole(p.dim);
    for (int64_t t = 0; t < tokens; ++t) {
        if (is_live(p, t))
            live.push_back(t);
        else
            write(p, kernels, t, 0, p.dim, nullptr, whole.data());
    }
    const int64_t count = int64_t(live.size()), most = std::min(count, std::max<int64_t>(kBlockUnits / row_units, 16));
    const Buffer<uint32_t> units(most * row_units);
    int64_t deepest = 0;
    for (const Part& part : parts) deepest = std::max(deepest, part.units);
    auto rooms = rooms_for(p.threads, 0, deepest * kernels.panel_columns);
    std::vector<Sums> sums;
    const int64_t columns = kSpanPanels * kernels.panel_columns;
    for (int t = 0; t < p.threads; ++t) sums.push_back({Buffer<float>(most * columns), Buffer<float>(columns)});
    for (int64_t start = 0; start < count; start += most) {
        const Block block{live.data() + start, std::min(most, count - start), units.data(), parts};
        take_turns(p.threads, block.count, [&](int, int64_t row) { look_up(p, kernels, block, row, units.data()); });
        take_turns(p.threads, spans, [&](int t, int64_t i) {
            const int64_t last = std::min((i + 1) * kSpanPanels, panels);
            embed_span(p, kernels, block, i * kSpanPanels, last, rooms[size_t(t)], sums[size_t(t)]);
        });
    }
}

}  // namespace

void ngram_embedding(const NgramEmbedding& p) {
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t s = 0; s < p.length; ++s)
            LC_CHECK(p.ids.at(b, s) >= -1 && p.ids.at(b, s) < p.word.rows, "ngram_embedding: ids must be in [-1, V)");
    if (p.batch * p.length == 0) return;
    hash_all(p);
    embed(p);
}

}  // namespace longcat
