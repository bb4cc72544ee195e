// gemm_kernels.h for one instruction set. Included once for each, inside its namespace and target. No include guard:
// see gemm_kernels.cpp.

constexpr int kWidth = Lanes::kWidth, kPanelColumns = 2 * kWidth;
using Element = std::conditional_t<kStep == 1, float, BFloat16>;

template <class Body>
static inline void with_type(DType dtype, Body&& body) {
    if (dtype == DType::float32) return body(float{});
    if (dtype == DType::bfloat16) return body(BFloat16{});
    body(Float16{});
}

template <class To, class From>
static inline To converted(From value) {
    if constexpr (std::is_same_v<To, From>)
        return value;
    else
        return from_float<To>(to_float(value));
}

template <class To, class From>
static inline void convert(const From* __restrict from, int64_t count, To* __restrict to) {
    int64_t i = 0;
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, BFloat16> && kStep == 2)
        for (; i + kWidth <= count; i += kWidth) narrow(from + i, to + i);
    for (; i < count; ++i) to[i] = converted<To>(from[i]);
}

template <class T>
static inline void to_units(const T* line, int64_t count, uint32_t* out) {
    auto* elements = reinterpret_cast<Element*>(out);
    convert(line, count, elements);
    for (int64_t i = count; i % kStep != 0; ++i) elements[i] = Element{};
}

static void pack_rows(const Lines& lines, int64_t first, int64_t count, int64_t depth, uint32_t* out, int64_t pitch) {
    with_type(lines.dtype, [&](auto type) {
        for (int64_t i = 0; i < count; ++i) to_units(lines.at<decltype(type)>(first + i), depth, out + i * pitch);
    });
}

// One unit of depth of `count` rows or columns; `second` is null past the end.
template <class T>
static inline void pair_up(const T* __restrict one, const T* __restrict second, int64_t count,
                           uint32_t* __restrict out) {
    if constexpr (kStep == 1) {
        convert(one, count, reinterpret_cast<float*>(out));
    } else if constexpr (std::is_same_v<T, float>) {
        for (int64_t i = 0; i < count; i += kWidth)
            narrow_pairs(one + i, second == nullptr ? nullptr : second + i, std::min<int64_t>(kWidth, count - i),
                         out + i);
    } else if (second == nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] = converted<BFloat16>(one[i]).bits;
    } else {
        for (int64_t i = 0; i < count; ++i)
            out[i] = uint32_t(converted<BFloat16>(one[i]).bits) | uint32_t(converted<BFloat16>(second[i]).bits) << 16;
    }
}

// The same of a register's width.
template <class T>
static inline void pair_up_lanes(const T* one, const T* second, uint32_t* out) {
    __builtin_prefetch(one + kPanelColumns);
    if (second != nullptr) __builtin_prefetch(second + kPanelColumns);
    if constexpr (std::is_same_v<T, float> && kStep == 1)
        Lanes::load(one).store_units(out);
    else
        pair_up(one, second, kWidth, out);
}

static void pack_steps(const Lines& lines, int64_t depth, int64_t first, int64_t count, int64_t width, uint32_t* out,
                       int64_t pitch) {
    with_type(lines.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t k = 0; k < depth; k += kStep, out += pitch) {
            const T *one = lines.at<T>(k) + first, *second = k + 1 < depth ? lines.at<T>(k + 1) + first : nullptr;
            if (count == kWidth && width == kWidth) {
                pair_up_lanes(one, kStep == 1 ? nullptr : second, out);
                continue;
            }
            pair_up(one, second, count, out);
            std::fill(out + count, out + width, 0u);
        }
    });
}

// The columns of a panel, as lines.
template <class T>
struct Columns {
    const T* line[2][kWidth];
    int64_t count[2], depth;
    int64_t next;          // from a line to the one in its place in the next panel
    bool goes_on = false;  // the next panel is read right after this one

    Columns(const Lines& lines, const Halves& halves, int64_t depth) : depth(depth) {
        for (int h = 0; h < 2; ++h) {
            count[h] = halves.count[h];
            for (int64_t c = 0; c < kWidth; ++c) line[h][c] = c < count[h] ? lines.at<T>(halves.first[h] + c) : nullptr;
        }
        next = (halves.first[1] == halves.first[0] + kWidth ? kPanelColumns : kWidth) * lines.stride;
    }

    // Calls body(units, count) with the units of one half from element `first` on, a register a unit.
    template <class Body>
    inline __attribute__((always_inline)) void block(int h, int64_t first, const Body& body) const {
        const int64_t elements = std::min<int64_t>(kWidth * kStep, depth - first);
        constexpr bool kAsTheyLie = std::is_same_v<T, Element> || std::is_same_v<T, float>;
        Lanes units[kWidth];
        if (kAsTheyLie && elements == kWidth * kStep && count[h] == kWidth) {
            ask_ahead(h, first);
            load_transposed(line[h], first, units);
            return body(units, std::integral_constant<int64_t, kWidth>{});  // a count that is known needs no branches
        }
        load_part(h, first, elements, units);
        body(units, (elements + kStep - 1) / kStep);
    }

    inline __attribute__((always_inline)) void ask_ahead(int h, int64_t first) const {
        constexpr int64_t kElements = kAhead / int64_t(sizeof(T));
        const bool in_line = first + kElements < depth;
        if (!in_line && !goes_on) return;
        const int64_t from = first + kElements + (in_line ? 0 : next - depth);
#pragma GCC unroll 16
        for (int c = 0; c < kWidth; ++c)
            for (int64_t i = 0; i < kWidth * kStep; i += 64 / int64_t(sizeof(T)))
                __builtin_prefetch(line[h][c] + from + i, 0, 2);
    }

    void load_part(int h, int64_t first, int64_t elements, Lanes (&units)[kWidth]) const {
        alignas(64) uint32_t room[kWidth][kWidth] = {};
        const uint32_t* rows[kWidth];
        for (int c = 0; c < kWidth; ++c) {
            rows[c] = room[c];
            if (c < count[h]) to_units(line[h][c] + first, elements, room[c]);
        }
        load_transposed(rows, 0, units);
    }
};

static void pack_columns(const Lines& lines, const Halves& halves, int64_t depth, uint32_t* panel) {
    with_type(lines.dtype, [&](auto type) {
        const Columns<decltype(type)> columns(lines, halves, depth);
        for (int64_t first = 0; first < depth; first += kWidth * kStep)
            for (int h = 0; h < 2; ++h) {
                uint32_t* out = panel + first / kStep * kPanelColumns + h * kWidth;
                columns.block(h, first, [&](const Lanes(&units)[kWidth], auto count) {
#pragma GCC unroll 16
                    for (int64_t u = 0; u < kWidth; ++u)
                        if (u < count) units[u].store_units(out + u * kPanelColumns);
                });
            }
    });
}

template <class T, int kRows>
static void stream_rows(const uint32_t* rows, int64_t pitch, const Columns<T>& columns, float* out, int64_t out_pitch,
                        bool add) {
    Lanes sums[kRows][2];
    for (int i = 0; i < kRows; ++i)
        for (int h = 0; h < 2; ++h) sums[i][h] = add ? Lanes::load(out + i * out_pitch + h * kWidth) : Lanes::splat(0);
    for (int64_t first = 0; first < columns.depth; first += kWidth * kStep)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
            columns.block(h, first, [&](const Lanes(&units)[kWidth], auto count) {
#pragma GCC unroll 16
                for (int64_t u = 0; u < kWidth; ++u) {
                    if (u >= count) break;
#pragma GCC unroll 8
                    for (int i = 0; i < kRows; ++i)
                        sums[i][h] = Lanes::multiply_add(Lanes::splat_unit(rows + i * pitch + first / kStep + u),
                                                         units[u], sums[i][h]);
                }
            });
    for (int i = 0; i < kRows; ++i)
        for (int h = 0; h < 2; ++h) sums[i][h].store(out + i * out_pitch + h * kWidth);
}

static void stream(const TileRows& rows, const Lines& lines, const Halves& halves, int64_t depth, float* out,
                   int64_t pitch, bool add) {
    with_type(lines.dtype, [&](auto type) {
        using T = decltype(type);
        Columns<T> columns(lines, halves, depth);
        columns.goes_on = true;
        switch (rows.count) {
            case 1:
                return stream_rows<T, 1>(rows.units, rows.pitch, columns, out, pitch, add);
            case 2:
                return stream_rows<T, 2>(rows.units, rows.pitch, columns, out, pitch, add);
            case 3:
                return stream_rows<T, 3>(rows.units, rows.pitch, columns, out, pitch, add);
            case 4:
                return stream_rows<T, 4>(rows.units, rows.pitch, columns, out, pitch, add);
            case 5:
                return stream_rows<T, 5>(rows.units, rows.pitch, columns, out, pitch, add);
            default:
                return stream_rows<T, 6>(rows.units, rows.pitch, columns, out, pitch, add);
        }
    });
}

#include "gemm_product_body.h"

static void store(const float* tile, int64_t tile_pitch, int64_t rows, int64_t count, void* out, DType dtype,
                  int64_t pitch, bool add) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t i = 0; i < rows; ++i) {
            T* to = static_cast<T*>(out) + i * pitch;
            const float* from = tile + i * tile_pitch;
            if (add)
                for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(to_float(to[j]) + from[j]);
            else if (count == kPanelColumns)
                convert(from, kPanelColumns, to);
            else if (count == kWidth)
                convert(from, kWidth, to);
            else
                convert(from, count, to);
        }
    });
}

// 1 / (1 + e^-x) to a few roundings: -x = n ln 2 + r, and a polynomial for e^r (Cephes expf). Of NaN some number: what
// is made of it is multiplied by x again. Step by step for all of them: one alone would wait for each of its steps.
template <int kCount>
static inline __attribute__((always_inline)) void sigmoids(const Floats (&x)[kCount], Floats (&result)[kCount]) {
    if constexpr (kStep == 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) result[i] = coarse_sigmoid(x[i]);
        return;
    }
    const auto splat = [](float value) { return Floats::splat(value); };
    const auto fused = [](Floats a, Floats b, Floats c) { return Floats::multiply_add(a, b, c); };
    const Floats magic = splat(12582912.0f), one = splat(1.0f);
    Floats shifted[kCount], r[kCount], p[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
        r[i] = Floats::larger(Floats::subtract(splat(0.0f), Floats::larger(x[i], splat(-88.0f))), splat(-87.0f));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) shifted[i] = fused(r[i], splat(1.44269504f), magic);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        const Floats n = Floats::subtract(shifted[i], magic);
        r[i] = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), r[i]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = fused(splat(1.9875691500e-4f), r[i], splat(1.3981999507e-3f));
#pragma GCC unroll 4
    for (const float term : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) p[i] = fused(p[i], r[i], splat(term));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = fused(p[i], Floats::multiply(r[i], r[i]), Floats::add(r[i], one));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) result[i] = Floats::reciprocal(fused(p[i], Floats::power_of_two(shifted[i]), one));
}

static inline Floats sigmoid(Floats x) {
    const Floats alone[1] = {x};
    Floats result[1];
    (sigmoids<1>)(alone, result);
    return result[0];
}

static inline Floats silu(Floats x) { return Floats::multiply(x, (sigmoid)(x)); }

// Activations of kCount rows, of which the last may be one again.
template <int kCount>
static inline void swiglu_rows(const SwigluTile& t, int64_t first) {
    Floats gate[kCount], share[kCount];
    int64_t row[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        row[i] = std::min(first + i, t.rows - 1);
        gate[i] = Floats::load(t.tile + row[i] * kPanelColumns);
    }
    (sigmoids<kCount>)(gate, share);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        const Floats up = Floats::load(t.tile + row[i] * kPanelColumns + kWidth);
        alignas(64) float act[kWidth];
        Floats::multiply(Floats::multiply(gate[i], share[i]), up).store(act);
        Element* to = static_cast<Element*>(t.act) + row[i] * t.act_pitch;
        if (t.count == kWidth)  // a count that is known needs no call to copy
            convert(act, kWidth, to);
        else
            convert(act, t.count, to);
    }
}

static void swiglu(const SwigluTile& t) {
    constexpr int kTogether = 6;
    for (int64_t i = 0; i < t.rows && t.act != nullptr; i += kTogether) swiglu_rows<kTogether>(t, i);
    if (t.gate == nullptr) return;
    store(t.tile, kPanelColumns, t.rows, t.count, t.gate, t.dtype, t.hidden_pitch, false);
    store(t.tile + kWidth, kPanelColumns, t.rows, t.count, t.up, t.dtype, t.hidden_pitch, false);
}

// Sum of a panel's columns: halves are folded onto each other.
static inline float folded(float* terms) {
#pragma GCC unroll 5
    for (int half = kPanelColumns / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; ++j) terms[j] += terms[j + half];
    return terms[0];
}

template <class T>
static inline __attribute__((always_inline)) void swiglu_grad_row(const SwigluGradTile& t, int64_t i, int64_t count) {
    constexpr int kCount = kPanelColumns;
    alignas(64) float gate[kCount] = {}, up[kCount] = {}, by_weight[kCount];
    alignas(64) float grad_gate[kCount], grad_up[kCount];
    const float *grad = t.tile + i * kCount, weight = t.weights[i];
    convert(static_cast<const T*>(t.gate) + i * t.pitch, count, gate);
    convert(static_cast<const T*>(t.up) + i * t.pitch, count, up);
    const Floats one = Floats::splat(1.0f);
#pragma GCC unroll 2
    for (int j = 0; j < kCount; j += kWidth) {
        const Floats g = Floats::load(gate + j), u = Floats::load(up + j), d = Floats::load(grad + j);
        const Floats s = (sigmoid)(g), act = Floats::multiply(g, s),
                     weighted = Floats::multiply(d, Floats::splat(weight));
        const Floats slope = Floats::multiply_add(act, Floats::subtract(one, s), s);
        Floats::multiply(d, Floats::multiply(act, u)).store(by_weight + j);
        Floats::multiply(Floats::multiply(weighted, u), slope).store(grad_gate + j);
        Floats::multiply(weighted, act).store(grad_up + j);
    }
    t.by_weight[i * t.by_weight_pitch] = folded(by_weight);
    convert(grad_gate, count, static_cast<T*>(t.grad_gate) + i * t.pitch);
    convert(grad_up, count, static_cast<T*>(t.grad_up) + i * t.pitch);
}

static void swiglu_grad(const SwigluGradTile& t) {
    with_type(t.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t i = 0; i < t.rows; ++i) {
            if (t.count == kPanelColumns)  // a count that is known needs no call to copy
                swiglu_grad_row<T>(t, i, kPanelColumns);
            else
                swiglu_grad_row<T>(t, i, t.count);
        }
    });
}

static void activate(const Lines& gate, const Lines& up, const float* weights, int64_t rows, int64_t first,
                     int64_t count, void* out, int64_t pitch) {
    with_type(gate.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t i = 0; i < rows; ++i) {
            const T *g = gate.at<T>(i) + first, *u = up.at<T>(i) + first;
            Element* to = static_cast<Element*>(out) + i * pitch;
            for (int64_t j = 0; j < count; j += kPanelColumns) {
                const int64_t some = std::min<int64_t>(kPanelColumns, count - j);
                alignas(64) float act[kPanelColumns] = {}, ups[kPanelColumns] = {};
                convert(g + j, some, act);
                convert(u + j, some, ups);
                for (int c = 0; c < kPanelColumns; c += kWidth) {
                    const Floats weighted = Floats::multiply(Floats::load(ups + c), Floats::splat(weights[i]));
                    Floats::multiply((silu)(Floats::load(act + c)), weighted).store(act + c);
                }
                convert(act, some, to + j);
            }
        }
    });
}

// Of kVectors registers of columns from `first` on.
template <int kVectors>
static inline void weighted_sum_part(const float* const* lines, const float* scales, int64_t lines_count, int64_t first,
                                     float* sum) {
    Floats sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = Floats::splat(0);
    for (int64_t i = 0; i < lines_count; ++i) {
        const float* line = lines[i] + first;
        const Floats scale = Floats::splat(scales[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            sums[v] = Floats::add(sums[v], Floats::multiply(scale, Floats::load(line + v * kWidth)));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v].store(sum + first + v * kWidth);
}

static void weighted_sum(const float* const* lines, const float* scales, int64_t lines_count, int64_t count,
                         float* sum) {
    int64_t j = 0;
    for (; j + 4 * kWidth <= count; j += 4 * kWidth) weighted_sum_part<4>(lines, scales, lines_count, j, sum);
    for (; j + kWidth <= count; j += kWidth) weighted_sum_part<1>(lines, scales, lines_count, j, sum);
    for (; j < count; ++j) {
        sum[j] = 0.0f;
        for (int64_t i = 0; i < lines_count; ++i) sum[j] += scales[i] * lines[i][j];
    }
}

static void add_scaled(const void* line, DType dtype, float scale, int64_t count, float* __restrict sum) {
    with_type(dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(line);
        for (int64_t j = 0; j < count; ++j) sum[j] += scale * to_float(from[j]);
    });
}

static float dot(const void* a, const void* b, DType dtype, int64_t count) {
    alignas(64) float sums[kPanelColumns] = {};
    with_type(dtype, [&](auto type) {
        const auto *one = static_cast<const decltype(type)*>(a), *other = static_cast<const decltype(type)*>(b);
        int64_t j = 0;
        for (; j + kPanelColumns <= count; j += kPanelColumns)
            for (int c = 0; c < kPanelColumns; ++c) sums[c] += to_float(one[j + c]) * to_float(other[j + c]);
        for (int c = 0; j < count; ++j, ++c) sums[c] += to_float(one[j]) * to_float(other[j]);
    });
    return folded(sums);
}

const GemmKernels kKernels = {kTileRows, kPanelColumns,   kStep,      pack_rows, pack_steps, pack_columns,
                              product,   packing_product, stream,     store,     swiglu,     swiglu_grad,
                              activate,  weighted_sum,    add_scaled, dot};
