// depth_kernels.h for one instruction set. Included once for each, inside its namespace and target. No include guard:
// see depth_kernels.cpp.

constexpr int kWidth = Lanes::kWidth, kHalfColumns = 2 * kWidth, kWideRows = kTileRows / 2;
using Element = std::conditional_t<kStep == 1, float, BFloat16>;

// How a row of half a panel is read: `kParts` registers for each of its two.
#if LC_PAIRS_ONLY
struct Pairs {
    static constexpr int kParts = 1, kRowBytes = kHalfColumns * 4, kDepth = 2;
    static inline Lanes load(const char* row, int side, int) {
        return Lanes::load_units(reinterpret_cast<const uint32_t*>(row) + side * kWidth);
    }
};
#else
struct Pairs {
    static constexpr int kParts = 2, kRowBytes = kHalfColumns * 4, kDepth = 2;
    static inline Lanes load(const char* row, int side, int part) {
        const Lanes units = Lanes::load_units(reinterpret_cast<const uint32_t*>(row) + side * kWidth);
        return part == 0 ? units.first() : units.second();
    }
};

struct Floats {
    static constexpr int kParts = 1, kRowBytes = kHalfColumns * 4, kDepth = 1;
    static inline Lanes load(const char* row, int side, int) {
        return Lanes::load(reinterpret_cast<const float*>(row) + side * kWidth);
    }
};

struct Bytes {
    static constexpr int kParts = 1, kRowBytes = kHalfColumns, kDepth = 1;
    static inline Lanes load(const char* row, int side, int) {
        return Lanes::load_bytes(reinterpret_cast<const int8_t*>(row) + side * kWidth);
    }
};
#endif

template <class Format, int kHalves, int kRows>
static void product_tile(const DepthTile& t) {
    Lanes sums[kRows][2 * kHalves];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * kHalves; ++j)
            sums[i][j] = t.go_on ? Lanes::load(t.sums + i * t.sums_pitch + j * kWidth) : Lanes::splat(0);
    // Three rows a pointer: more pointers than that do not fit the registers.
    constexpr int kPointers = (kRows + 2) / 3;
    const uint32_t* at[kPointers];
    const int64_t pitch = t.x_pitch / 4;
#pragma GCC unroll 4
    for (int group = 0; group < kPointers; ++group) at[group] = static_cast<const uint32_t*>(t.x) + 3 * group * pitch;
    const char *row = static_cast<const char*>(t.weights), *ahead = t.ahead;
    const int64_t half_pitch = t.half_pitch, ahead_step = t.ahead_step;
    const int64_t row_pitch = t.row_pitch;
    for (const char* end = row + t.steps * row_pitch; row != end; row += row_pitch) {
        for (int line = 0; line < kHalves * Format::kRowBytes; line += 64) __builtin_prefetch(ahead + line);
        ahead += ahead_step;
#pragma GCC unroll 2
        for (int part = 0; part < Format::kParts; ++part) {
            Lanes columns[2 * kHalves];
#pragma GCC unroll 4
            for (int j = 0; j < 2 * kHalves; ++j) columns[j] = Format::load(row + j / 2 * half_pitch, j % 2, part);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Lanes x = Lanes::splat_unit(at[i / 3] + (i % 3) * pitch + part);
#pragma GCC unroll 4
                for (int j = 0; j < 2 * kHalves; ++j) sums[i][j] = Lanes::multiply_add(x, columns[j], sums[i][j]);
            }
        }
#pragma GCC unroll 4
        for (int group = 0; group < kPointers; ++group) at[group] += Format::kParts;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * kHalves; ++j) sums[i][j].store(t.sums + i * t.sums_pitch + j * kWidth);
}

using Tile = void (*)(const DepthTile&);

template <class Format, int kHalves, int... kLess>
static Tile tile_of(int rows, std::integer_sequence<int, kLess...>) {
    static constexpr Tile tiles[] = {product_tile<Format, kHalves, kLess + 1>...};
    return tiles[rows - 1];
}

template <class Format>
static void product(const DepthTile& t) {
    if (t.halves == 1)
        tile_of<Format, 1>(t.rows, std::make_integer_sequence<int, kTileRows>{})(t);
    else
        tile_of<Format, 2>(t.rows, std::make_integer_sequence<int, kWideRows>{})(t);
}

// Results of `count` columns of a row. What is absent is not even read under a mask: that would cost a trap.
static inline void results(const DepthSums& s, int64_t row, int64_t first, int64_t count, float* __restrict out) {
    const float* __restrict sums = s.sums + row * s.pitch + first;
    for (int64_t j = 0; j < count; ++j) out[j] = sums[j];
    if (s.scale != nullptr)
        for (int64_t j = 0; j < count; ++j) out[j] *= s.scale[first + j];
    if (s.bias != nullptr)
        for (int64_t j = 0; j < count; ++j) out[j] += s.bias[first + j];
}

static void put(const DepthSums& s, float* out, int64_t pitch, bool add) {
    alignas(64) float row[2 * kHalfColumns];
    for (int64_t i = 0; i < s.rows; ++i) {
        float* __restrict to = out + i * pitch;
        results(s, i, 0, s.count, row);
        if (add)
            for (int64_t j = 0; j < s.count; ++j) to[j] += row[j];
        else
            std::copy_n(row, s.count, to);
    }
}

// Floats as elements of products.
template <class E>
static inline void to_elements(const float* __restrict from, int64_t count, E* __restrict to) {
    int64_t j = 0;
    if constexpr (kStep == 2)
        for (; j + kWidth <= count; j += kWidth) narrow(from + j, to + j);
    for (; j < count; ++j) to[j] = from_float<E>(from[j]);
}

static void activate(const DepthSums& s, bool gated, void* out, int64_t pitch) {
    alignas(64) float first[2 * kHalfColumns], second[kHalfColumns];
    for (int64_t i = 0; i < s.rows; ++i) {
        results(s, i, 0, s.count, first);
        if (gated) {
            results(s, i, kHalfColumns, s.count, second);
            for (int64_t j = 0; j < s.count; ++j) first[j] = silu(first[j]) * second[j];
        } else {
            for (int64_t j = 0; j < s.count; ++j) first[j] = gelu(first[j]);
        }
        to_elements(first, s.count, static_cast<Element*>(out) + i * pitch);
    }
}

// Sum of products, a register's width side by side and four of them in turn; what is left goes one by one.
static inline float dot(const float* a, const float* b, int64_t count) {
    Lanes sums[4] = {Lanes::splat(0), Lanes::splat(0), Lanes::splat(0), Lanes::splat(0)};
    int64_t j = 0;
    for (; j + 4 * kWidth <= count; j += 4 * kWidth)
        for (int part = 0; part < 4; ++part)
            sums[part] = Lanes::add(
                sums[part], Lanes::multiply(Lanes::load(a + j + part * kWidth), Lanes::load(b + j + part * kWidth)));
    for (; j + kWidth <= count; j += kWidth)
        sums[0] = Lanes::add(sums[0], Lanes::multiply(Lanes::load(a + j), Lanes::load(b + j)));
    float total = Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])).total();
    for (; j < count; ++j) total += a[j] * b[j];
    return total;
}

static inline float inverse_rms(const float* x, float eps, int64_t count) {
    return 1.0f / std::sqrt(dot(x, x, count) / float(count) + eps);
}

static void norm(const float* x, const float* weight, float eps, int64_t dim, void* out) {
    const float scale = weight == nullptr ? 1.0f : inverse_rms(x, eps, dim);
    alignas(64) float part[16 * kWidth];
    for (int64_t first = 0; first < dim; first += 16 * kWidth) {
        const int64_t count = std::min<int64_t>(16 * kWidth, dim - first);
        for (int64_t j = 0; j < count; ++j) part[j] = x[first + j] * scale;
        for (int64_t j = 0; j < count && weight != nullptr; ++j) part[j] *= weight[first + j];
        to_elements(part, count, static_cast<Element*>(out) + first);
    }
}

static void turn(float* x, const float* weight, float eps, const float* rope, int64_t rope_pitch, int64_t heads,
                 int64_t width) {
    for (int64_t h = 0; h < heads; ++h, x += width) {
        if (weight != nullptr) {
            const float scale = inverse_rms(x, eps, width);
            for (int64_t j = 0; j < width; ++j) x[j] = x[j] * scale * weight[j];
        }
        if (rope == nullptr) continue;
        const int64_t half = width / 2;
        const float *cosine = rope, *sine = rope + rope_pitch;
        for (int64_t j = 0; j < half; ++j) {
            const float a = x[j], b = x[half + j];
            x[j] = a * cosine[j] - b * sine[j];
            x[half + j] = b * cosine[j] + a * sine[j];
        }
    }
}

// sum[j] += scale * x[j].
static inline void add_scaled(float scale, const float* __restrict x, int64_t count, float* __restrict sum) {
    for (int64_t j = 0; j < count; ++j) sum[j] += scale * x[j];
}

static void attend(const DepthGroup& g, float* room, void* out) {
    alignas(64) float weights[kMostLevels];
    for (int64_t h = 0; h < g.heads; ++h) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
        if (g.steps == 1) {
            to_elements(g.values, g.width, static_cast<Element*>(out) + h * g.width);
            continue;
        }
        for (int64_t t = 0; t < g.steps; ++t) {
            weights[t] = dot(g.queries + h * g.width, g.keys + t * g.pitch, g.width) * g.scale;
            largest = std::max(largest, weights[t]);
        }
        for (int64_t t = 0; t < g.steps; ++t) {
            const float x = weights[t] - largest;
            weights[t] = x == x ? exponential(x) : x;
            total += weights[t];
        }
        std::fill_n(room, g.width, 0.0f);
        for (int64_t t = 0; t < g.steps; ++t) add_scaled(weights[t] / total, g.values + t * g.pitch, g.width, room);
        to_elements(room, g.width, static_cast<Element*>(out) + h * g.width);
    }
}

static void add_row(const void* row, DType dtype, int64_t count, float* __restrict sum) {
    const auto add = [&](const auto* __restrict from) {
        for (int64_t j = 0; j < count; ++j) sum[j] += to_float(from[j]);
    };
    if (dtype == DType::float32) return add(static_cast<const float*>(row));
    if (dtype == DType::bfloat16) return add(static_cast<const BFloat16*>(row));
    add(static_cast<const Float16*>(row));
}

static void encode_pairs(const float* half, int64_t depth, void* out, int64_t pitch, float*) {
    for (int64_t k = 0; k < depth; k += 2, half += 2 * kHalfColumns) {
        auto* to = reinterpret_cast<uint32_t*>(static_cast<char*>(out) + k / 2 * pitch);
        for (int j = 0; j < kHalfColumns; ++j) {
            const float second = k + 1 < depth ? half[kHalfColumns + j] : 0.0f;
            to[j] = uint32_t(from_float<BFloat16>(half[j]).bits) | uint32_t(from_float<BFloat16>(second).bits) << 16;
        }
    }
}

template <class Format>
constexpr DepthKernels kernels_of(decltype(DepthKernels::encode) encode) {
    return {kTileRows, kWideRows, kHalfColumns, kStep,  Format::kRowBytes, Format::kDepth, product<Format>, put,
            activate,  norm,      turn,         attend, add_row,           encode};
}

const DepthKernels kPairs = kernels_of<Pairs>(encode_pairs);

#if !LC_PAIRS_ONLY
static void encode_floats(const float* half, int64_t depth, void* out, int64_t pitch, float*) {
    for (int64_t k = 0; k < depth; ++k)
        std::copy_n(half + k * kHalfColumns, kHalfColumns,
                    reinterpret_cast<float*>(static_cast<char*>(out) + k * pitch));
}

static void encode_bytes(const float* half, int64_t depth, void* out, int64_t pitch, float* scales) {
    for (int j = 0; j < kHalfColumns; ++j) {
        float most = 0.0f;
        for (int64_t k = 0; k < depth; ++k) most = std::max(most, std::abs(half[k * kHalfColumns + j]));
        scales[j] = most > 0.0f ? most / 127.0f : 1.0f;
    }
    for (int64_t k = 0; k < depth; ++k) {
        auto* to = static_cast<int8_t*>(out) + k * pitch;
        for (int j = 0; j < kHalfColumns; ++j) to[j] = int8_t(std::nearbyint(half[k * kHalfColumns + j] / scales[j]));
    }
}

const DepthKernels kFloats = kernels_of<Floats>(encode_floats);
const DepthKernels kBytes = kernels_of<Bytes>(encode_bytes);
#endif
