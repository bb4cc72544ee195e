#include "longcat/depth_decode.h"

#include <cmath>
#include <cstring>

#include "depth_frame.h"

namespace longcat {
namespace {

template <class Body>
void each_thread(int threads, const Body& body) {
    if (threads == 1) return body(0);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) body(t);
}

WeightFormat format_of(const DepthDecode& p) {
    if (p.packed != nullptr) return p.format;
    const bool in_pairs = p.isa == Isa::avx512_bf16 && p.dtype == DType::bfloat16;
    return in_pairs ? WeightFormat::bfloat16 : WeightFormat::float32;
}

char* on_a_line(void* scratch) {
    return reinterpret_cast<char*>(ceil_div(reinterpret_cast<uintptr_t>(scratch), uintptr_t(kLine)) * kLine);
}

// One call. A stage is a step that all threads finish before the next one begins.
class Frame {
  public:
    explicit Frame(const DepthDecode& p)
        : p_(p),
          s_(p.shape),
          format_(format_of(p)),
          kernels_(depth_kernels(p.isa, format_)),
          stream_(kernels_, gemm_kernels(p.isa, p.dtype)),
          draw_(draw_code(p.isa)),
          rows_(active_rows(p)),
          count_(int64_t(rows_.size())),
          desks_(size_t(p.threads)) {
        Arena arena{on_a_line(p.scratch)};
        m_.lay_out(arena, p_, kernels_, count_);
        for (DepthDesk& desk : desks_) {
            desk.lay_out(arena, p_, kernels_, m_, count_);
            desk.worker.number = int(&desk - desks_.data()), desk.worker.threads = p_.threads;
        }
        model_ = p.packed == nullptr ? unpacked_model(s_, *p.weights, m_.vectors) : packed_model(s_, p.packed);
    }

    void run() {
        if (count_ == 0) return;
        begin();
        for (int64_t level = 0; level < s_.levels; ++level) {
            project(level);
            for (int64_t layer = 0; layer < s_.layers; ++layer) {
                attend(level, layer);
                feed_forward(level, layer);
            }
            if (level >= s_.given) head(level);
            each_thread(p_.threads, [&](int t) {
                const auto [first, last] = desks_[size_t(t)].worker.share(count_);
                for (int64_t i = first; i < last; ++i)
                    if (rows_[size_t(i)].leader == i) draw(desks_[size_t(t)], level, i);
            });
            for (int64_t i = 0; i < count_; ++i) condition(level, i);
        }
        finish();
    }

  private:
    // Elements of products past the end of a row are read, too.
    void begin() {
        std::memset(m_.mixed, 0, size_t(count_ * m_.mixed_pitch));
        std::memset(m_.act, 0, size_t(count_ * m_.act_pitch));
        for (DepthDesk& desk : desks_) {
            std::memset(desk.wide, 0, size_t(count_ * m_.hidden_pitch));
            std::memset(desk.narrow, 0, size_t(count_ * m_.dim_pitch));
        }
        const int64_t width = s_.table_width();
        std::fill_n(m_.total, count_ * width, 0.0f);
        std::fill_n(m_.hidden, count_ * s_.hidden, 0.0f), std::fill_n(m_.input, count_ * width, 0.0f);
        for (int64_t i = 0; i < count_; ++i) {
            add_row(p_.hidden, rows_[size_t(i)].row, s_.hidden, m_.hidden + i * s_.hidden);
            if (p_.start.data != nullptr) add_row(p_.start, rows_[size_t(i)].row, width, m_.input + i * width);
        }
    }

    void add_row(const Strided& matrix, int64_t row, int64_t count, float* sum) const {
        const auto* data = static_cast<const char*>(matrix.data) + row * matrix.row * bytes_of(matrix.dtype);
        kernels_.add_row(data, matrix.dtype, count, sum);
    }

    // The stages of products of all levels, by number: projection, then four a layer, then the head.
    Stage stage(int64_t number) const {
        const int64_t a_level = 4 * s_.layers + 2, level = number / a_level, step = number % a_level;
        if (level >= s_.levels) return {};
        if (step == 0) return {{&model_.projection[size_t(s_.projection_sets[level])]}};
        if (step == a_level - 1) return {{&model_.heads[size_t(level)]}};
        const DepthBlock& b = model_.layers[size_t((step - 1) / 4)];
        const auto attention = size_t(s_.attention_sets[level]), ffn = size_t(s_.ffn_sets[level]);
        if (step % 4 == 1) return {{&b.k[attention], &b.v[attention], level == 0 ? nullptr : &b.q[attention]}};
        if (step % 4 == 2) return {{&b.out[attention]}};
        return {{step % 4 == 3 ? &b.up[ffn] : &b.down[ffn]}};
    }

    int64_t number(int64_t level, int64_t step) const { return level * (4 * s_.layers + 2) + step; }

    // `rows(desk)` makes or gives the rows of elements that the products of a stage read; `take` uses their sums.
    template <class Rows, class Take>
    void products(int64_t number, const Rows& rows, const Take& take) {
        const Stage here = stage(number), next = stage(number + 1);
        each_thread(p_.threads, [&](int t) {
            DepthDesk& desk = desks_[size_t(t)];
            stream_.run(desk.worker, here, &next, rows(desk), take);
        });
    }

    // Every thread norms all rows for itself: cheaper than to wait for each other.
    DepthRows normed(char* out, int64_t pitch, const float* x, const float* weight, int64_t dim) const {
        for (int64_t i = 0; i < count_; ++i) kernels_.norm(x + i * dim, weight, s_.eps, dim, out + i * pitch);
        return {out, pitch, count_};
    }

    DepthRows normed_z(const DepthDesk& desk, const float* weight) const {
        return normed(desk.narrow, m_.dim_pitch, m_.z, weight, s_.dim);
    }

    void project(int64_t level) {
        const bool has_both = s_.conditioning == Conditioning::last_and_hidden;
        const float* x = has_both || level == 0 ? m_.hidden : m_.input;
        if (!has_projection()) return keep(x, has_both);
        if (has_both) std::copy_n(m_.input, count_ * s_.dim, m_.z);
        products(
            number(level, 0),
            [&](const DepthDesk& desk) { return normed(desk.wide, m_.hidden_pitch, x, model_.input_norm, s_.hidden); },
            [&](int, int64_t column, const DepthSums& sums) { kernels_.put(sums, m_.z + column, s_.dim, has_both); });
    }

    bool has_projection() const {
        const DepthMatrix& m = model_.projection[0];
        return m.panels != nullptr || m.lines[0].data != nullptr;
    }

    // Without a projection the normed input goes into the layers as it is.
    void keep(const float* x, bool add) {
        std::copy_n(x, count_ * s_.dim, m_.z);
        kernels_.turn(m_.z, model_.input_norm, s_.eps, nullptr, 0, count_, s_.dim);
        for (int64_t j = 0; add && j < count_ * s_.dim; ++j) m_.z[j] += m_.input[j];
    }

    void attend(int64_t level, int64_t layer) {
        const DepthBlock& block = model_.layers[size_t(layer)];
        const int64_t queries = s_.heads * s_.head_dim, keys = s_.kv_heads * s_.head_dim, slots = s_.levels * keys;
        float* const targets[] = {m_.keys + layer * count_ * slots + level * keys,
                                  m_.values + layer * count_ * slots + level * keys, m_.q};
        products(
            number(level, 4 * layer + 1), [&](const DepthDesk& desk) { return normed_z(desk, block.norm1); },
            [&](int matrix, int64_t column, const DepthSums& sums) {
                kernels_.put(sums, targets[matrix] + column, matrix == 2 ? queries : slots, false);
            });
        each_thread(p_.threads, [&](int t) {
            const auto [first, last] = desks_[size_t(t)].worker.share(count_ * s_.kv_heads);
            for (int64_t i = first; i < last; ++i)
                attend_group(desks_[size_t(t)], block, level, layer, i / s_.kv_heads, i % s_.kv_heads);
        });
        products(
            number(level, 4 * layer + 2), [&](const DepthDesk&) { return DepthRows{m_.mixed, m_.mixed_pitch, count_}; },
            [&](int, int64_t column, const DepthSums& sums) { kernels_.put(sums, m_.z + column, s_.dim, true); });
    }

    void attend_group(const DepthDesk& desk, const DepthBlock& block, int64_t level, int64_t layer, int64_t row,
                      int64_t group) {
        const int64_t heads = s_.heads / s_.kv_heads, keys = s_.kv_heads * s_.head_dim, width = s_.head_dim;
        const int64_t first = (layer * count_ + row) * s_.levels * keys + group * width;
        const int64_t query = group * heads * width;
        float* q = m_.q + row * s_.heads * width + query;
        const float* rope = model_.rope == nullptr ? nullptr : model_.rope + level * (width / 2);
        const int64_t sines = s_.levels * (width / 2);
        kernels_.turn(m_.keys + first + level * keys, block.k_norm, s_.eps, rope, sines, 1, width);
        if (level > 0) kernels_.turn(q, block.q_norm, s_.eps, rope, sines, heads, width);
        const DepthGroup shape{
            heads, width, level + 1, q, m_.keys + first, m_.values + first, keys, 1.0f / std::sqrt(float(width))};
        kernels_.attend(shape, desk.head, m_.mixed + row * m_.mixed_pitch + query * (4 / kernels_.step));
    }

    void feed_forward(int64_t level, int64_t layer) {
        const DepthBlock& block = model_.layers[size_t(layer)];
        const int64_t pitch = m_.act_pitch / (4 / kernels_.step);
        products(
            number(level, 4 * layer + 3), [&](const DepthDesk& desk) { return normed_z(desk, block.norm2); },
            [&](int, int64_t column, const DepthSums& sums) {
                kernels_.activate(sums, s_.gated, m_.act + column * (4 / kernels_.step), pitch);
            });
        products(
            number(level, 4 * layer + 4), [&](const DepthDesk&) { return DepthRows{m_.act, m_.act_pitch, count_}; },
            [&](int, int64_t column, const DepthSums& sums) { kernels_.put(sums, m_.z + column, s_.dim, true); });
    }

    void head(int64_t level) {
        const float* weight = model_.final_norm[size_t(s_.norm_sets[level])];
        products(
            number(level, 4 * s_.layers + 1), [&](const DepthDesk& desk) { return normed_z(desk, weight); },
            [&](int, int64_t column, const DepthSums& sums) {
                kernels_.put(sums, m_.logits + column, m_.logits_pitch, false);
            });
        if (p_.logits == nullptr) return;
        int64_t width = 0, begin = 0;
        for (int64_t l = s_.given; l < s_.levels; ++l) width += s_.classes[l], begin += l < level ? s_.classes[l] : 0;
        for (int64_t i = 0; i < count_; ++i)
            std::copy_n(m_.logits + i * m_.logits_pitch, s_.classes[level],
                        p_.logits + rows_[size_t(i)].row * width + begin);
    }

    // The code of a row that leads, written for its follower too.
    void draw(const DepthDesk& desk, int64_t level, int64_t i) {
        const int64_t row = rows_[size_t(i)].row, follower = rows_[size_t(i)].follower;
        const int64_t forced = level < p_.forced ? p_.prefix[row * p_.forced + level] : -1;
        Drawn drawn{forced, 0.0f, 0.0f};
        if (level >= s_.given) {
            Draw d{};
            d.logits = m_.logits + i * m_.logits_pitch;
            d.others = follower < 0 ? nullptr : m_.logits + follower * m_.logits_pitch;
            d.classes = s_.classes[level], d.level = level;
            d.params = p_.params + row * p_.params_row + level * p_.params_level;
            d.seed = p_.seeds[row], d.step = p_.steps[row], d.forced = forced;
            if (p_.history != nullptr) {
                d.history = p_.history + p_.offsets[row] * s_.levels + level;
                d.history_count = p_.offsets[row + 1] - p_.offsets[row], d.history_pitch = s_.levels;
            }
            drawn = draw_(d, desk.draw);
        }
        write(row * s_.levels + level, drawn);
        if (follower >= 0) write(rows_[size_t(follower)].row * s_.levels + level, drawn);
    }

    void write(int64_t place, const Drawn& drawn) {
        p_.codes[place] = drawn.code;
        p_.logprobs[place] = drawn.logprob, p_.drawn_logprobs[place] = drawn.drawn_logprob;
    }

    // What the code of this level makes of a row's next input.
    void condition(int64_t level, int64_t i) {
        const Strided& table = p_.tables[size_t(level)];
        if (table.data == nullptr) return;
        DepthRow& row = rows_[size_t(i)];
        const int64_t width = s_.table_width(), code = p_.codes[row.row * s_.levels + level];
        float *input = m_.input + i * width, *total = m_.total + i * width;
        add_row(table, code, width, total);
        row.ended = row.ended && code == s_.classes[level] - 1;
        if (s_.conditioning == Conditioning::sum && !row.ended) {
            std::copy_n(total, width, input);
        } else {
            std::fill_n(input, width, 0.0f);
            if (s_.conditioning != Conditioning::sum) add_row(table, code, width, input);
        }
    }

    void finish() {
        const int64_t width = s_.table_width();
        dispatch_float(p_.dtype, "depth_decode: hidden", [&](auto type) {
            using T = decltype(type);
            for (int64_t i = 0; i < count_; ++i) {
                T* out = static_cast<T*>(p_.embedding) + rows_[size_t(i)].row * width;
                const float* total = m_.total + i * width;
                for (int64_t j = 0; j < width; ++j) out[j] = from_float<T>(rows_[size_t(i)].ended ? 0.0f : total[j]);
            }
        });
    }

    const DepthDecode& p_;
    const DepthShape& s_;
    const WeightFormat format_;
    const DepthKernels& kernels_;
    const Stream stream_;
    const DrawCode draw_;
    std::vector<DepthRow> rows_;
    const int64_t count_;  // of active rows
    std::vector<DepthDesk> desks_;
    DepthMemory m_{};
    DepthModel model_;
};

// Rows that are not active: code -1 and zeros.
void clear(const DepthDecode& p) {
    const DepthShape& s = p.shape;
    int64_t classes = 0;
    for (int64_t l = s.given; l < s.levels; ++l) classes += s.classes[l];
    for (int64_t row = 0; row < p.rows; ++row) {
        if (p.active == nullptr || p.active[p.leaders == nullptr ? row : p.leaders[row]]) continue;
        std::fill_n(p.codes + row * s.levels, s.levels, -1);
        std::fill_n(p.logprobs + row * s.levels, s.levels, 0.0f);
        std::fill_n(p.drawn_logprobs + row * s.levels, s.levels, 0.0f);
        const int64_t bytes = s.table_width() * bytes_of(p.dtype);
        std::memset(static_cast<char*>(p.embedding) + row * bytes, 0, size_t(bytes));
        if (p.logits != nullptr) std::fill_n(p.logits + row * classes, classes, 0.0f);
    }
}

}  // namespace

int64_t depth_scratch_bytes(const DepthDecode& p) {
    const DepthKernels& kernels = depth_kernels(p.isa, format_of(p));
    Arena arena{nullptr};
    DepthMemory memory{};
    memory.lay_out(arena, p, kernels, p.rows);
    for (int t = 0; t < p.threads; ++t) DepthDesk{}.lay_out(arena, p, kernels, memory, p.rows);
    return arena.used + kLine;
}

void depth_decode(const DepthDecode& p) {
    clear(p);
    Frame frame(p);
    frame.run();
}

}  // namespace longcat
