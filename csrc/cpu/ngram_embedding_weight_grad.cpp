#include "longcat/ngram_embedding_weight_grad.h"

#include "gemm.h"
#include "runs.h"

namespace longcat {
namespace {

class WeightGrad {
  public:
    explicit WeightGrad(const NgramEmbeddingWeightGrad& problem)
        : p(problem), kernels(gemm_kernels(problem.isa, problem.dtype)), tables(int64_t(problem.tables.size())) {
        for (int64_t t = 0; t < p.grad.rows; ++t) {
            const int64_t* hashes = p.hashes + t * tables;
            for (int64_t i = 0; i < tables; ++i)
                LC_CHECK(hashes[i] >= 0 && hashes[i] < p.tables[size_t(i)].rows.rows,
                         "ngram_embedding_weight_grad: hashes must be rows of the tables");
            if (std::any_of(hashes, hashes + tables, [](int64_t n) { return n != 0; })) live.push_back(int32_t(t));
        }
    }

    void run() {
        if (p.words > 0) words();
        const auto wants_rows = [](const auto& table) { return table.size > 0; };
        const auto wants_projection = [](const auto& table) { return table.grad_projection != nullptr; };
        if (std::any_of(p.tables.begin(), p.tables.end(), wants_rows)) rows();
        if (std::any_of(p.tables.begin(), p.tables.end(), wants_projection)) projections();
    }

  private:
    const NgramEmbeddingWeightGrad& p;
    const GemmKernels& kernels;
    const int64_t tables;
    std::vector<int32_t> live;

    float share() const { return float(1.0 / double(1 + tables)); }

    Lines grad_lines() const { return {p.grad.data, p.dtype, p.grad.stride, live.data()}; }

    // Multiplies `left` with all panels of `columns` columns that lie across `lines`; `target` and `take` as there.
    template <class Target, class Take>
    void multiply_all(const Left& left, const Lines& lines, int64_t columns, const Target& target,
                      const Take& take) const {
        const auto panel = [&](int64_t at) { return Panel{lines, halves_of(kernels, columns, at), left.depth, true}; };
        auto rooms = rooms_for(p.threads, 0, ceil_div(left.depth, kernels.step) * kernels.panel_columns);
        const auto parts = shares(1, p.threads, [&](int64_t) { return ceil_div(columns, kernels.panel_columns); });
        take_turns(p.threads, int64_t(parts.size()), [&](int t, int64_t i) {
            const Share& part = parts[size_t(i)];
            multiply(kernels, left, part.first_panel, part.last_panel, rooms[size_t(t)], panel, target, take);
        });
    }

    // out[key] = scale(key) * sum of the run's rows; the others of `size` rows are zero.
    template <class Key, class Row, class Scale>
    void sum_runs(int64_t count, const Key& key, const Row& add, const Scale& scale, void* out, int64_t size,
                  int64_t width) {
        const Runs runs(count, key);
        LC_CHECK(runs.order.empty() || key(runs.order.back()) < size,
                 "ngram_embedding_weight_grad: ids and slots must be rows of the gradients");
        const int64_t row_bytes = width * bytes_of(p.dtype);
        char* rows = static_cast<char*>(out);
#pragma omp parallel num_threads(p.threads)
        {
            const Buffer<float> sums(width), scaled(width);
            if (runs.count() < size) {
#pragma omp for schedule(static)
                for (int64_t k = 0; k < size; ++k) std::fill_n(rows + k * row_bytes, row_bytes, char(0));
            }
#pragma omp for schedule(static)
            for (int64_t run = 0; run < runs.count(); ++run) {
                std::fill_n(sums.data(), width, 0.0f);
                std::fill_n(scaled.data(), width, 0.0f);
                const int64_t first = runs.starts[size_t(run)], last = runs.starts[size_t(run) + 1];
                for (int64_t i = first; i < last; ++i) add(runs.order[size_t(i)], sums.data());
                const int64_t k = key(runs.order[size_t(first)]);
                kernels.add_scaled(sums.data(), DType::float32, scale(k), width, scaled.data());
                kernels.store(scaled.data(), width, 1, width, rows + k * row_bytes, p.dtype, width, false);
            }
        }
    }

    void words() {
        const auto id = [&](int64_t t) { return p.ids.at(t / p.length, t % p.length); };
        const auto add = [&](int64_t t, float* sums) {
            const void* row = static_cast<const char*>(p.grad.data) + t * p.grad.stride * bytes_of(p.dtype);
            kernels.add_scaled(row, p.dtype, 1.0f, p.grad.width, sums);
        };
        const auto scale = [&](int64_t k) { return p.rule.ignores(k) ? 1.0f : share(); };
        sum_runs(p.grad.rows, id, add, scale, p.grad_word, p.words, p.grad.width);
    }

    void rows() {
        const int64_t count = int64_t(live.size()), dim = p.grad.width;
        const int64_t pitch = odd_pitch(ceil_div(dim, kernels.step));
        const Buffer<uint32_t> units(count * pitch);
        kernels.pack_rows(grad_lines(), 0, count, dim, units.data(), pitch);
        for (int64_t i = 0; i < tables; ++i) {
            const auto& table = p.tables[size_t(i)];
            if (table.size == 0) continue;
            const int64_t width = table.rows.width, row = round_up(width, kernels.panel_columns);
            const Buffer<float> products(count * row);
            const auto target = [&](const Place& place, float*, int64_t& out_pitch) {
                out_pitch = row;
                return products.data() + place.row * row + place.panel * kernels.panel_columns;
            };
            multiply_all({count, dim, {}, false, units.data(), pitch},
                         {table.projection.data, p.dtype, table.projection.stride}, width, target,
                         [](const Place&, const float*) {});
            const auto slot = [&](int64_t n) {
                const int64_t at = live[size_t(n)] * tables + i;
                return p.hashes[at] == 0 ? -1 : p.slots[at];
            };
            const auto add = [&](int64_t n, float* sums) {
                kernels.add_scaled(products.data() + n * row, DType::float32, 1.0f, width, sums);
            };
            sum_runs(count, slot, add, [&](int64_t) { return share(); }, table.grad_rows, table.size, width);
        }
    }

    void projections() {
        const int64_t count = int64_t(live.size()), dim = p.grad.width, pitch = odd_pitch(dim);
        const Buffer<uint32_t> units(ceil_div(count, kernels.step) * pitch);
        kernels.pack_steps(grad_lines(), count, 0, dim, dim, units.data(), pitch);
        for (int64_t i = 0; i < tables; ++i) {
            const auto& table = p.tables[size_t(i)];
            const int64_t width = table.rows.width, size = bytes_of(p.dtype);
            const Buffer<char> rows = look_up(i);
            const auto target = [](const Place&, float* tile, int64_t&) { return tile; };
            const auto take = [&](const Place& place, const float* tile) {
                const int64_t columns = kernels.panel_columns, column = place.panel * columns;
                float scaled[kMostTileRows * kMostPanelColumns] = {};
                kernels.add_scaled(tile, DType::float32, share(), place.rows * columns, scaled);
                kernels.store(scaled, columns, place.rows, std::min(columns, width - column),
                              static_cast<char*>(table.grad_projection) + (place.row * width + column) * size, p.dtype,
                              width, false);
            };
            multiply_all({dim, count, {}, true, units.data(), pitch}, {rows.data(), p.dtype, width}, width, target,
                         take);
        }
    }

    // The rows of table i of the live tokens, one below the other.
    Buffer<char> look_up(int64_t i) const {
        const auto& table = p.tables[size_t(i)].rows;
        const int64_t size = bytes_of(p.dtype), bytes = table.width * size;
        Buffer<char> rows(int64_t(live.size()) * bytes);
        for (size_t n = 0; n < live.size(); ++n) {
            const int64_t hash = p.hashes[live[n] * tables + i];
            char* out = rows.data() + int64_t(n) * bytes;
            if (hash == 0)
                std::fill_n(out, bytes, char(0));
            else
                std::copy_n(static_cast<const char*>(table.data) + hash * table.stride * size, bytes, out);
        }
        return rows;
    }
};

}  // namespace

void ngram_embedding_weight_grad(const NgramEmbeddingWeightGrad& p) { WeightGrad(p).run(); }

}  // namespace longcat
