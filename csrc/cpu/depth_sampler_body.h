// depth_sampler.h for one instruction set. Included once for each, inside its namespace and target. No include guard:
// see depth_sampler.cpp.

constexpr int kWidth = Lanes::kWidth;
constexpr uint64_t kWord = 0xffffffffu;

static inline float largest_of(const float* x, int64_t count) {
    float largest = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    if (count >= 4 * kWidth) {
        Lanes most[4] = {Lanes::load(x), Lanes::load(x), Lanes::load(x), Lanes::load(x)};
        for (; i + 4 * kWidth <= count; i += 4 * kWidth)
            for (int part = 0; part < 4; ++part)
                most[part] = Lanes::larger(Lanes::load(x + i + part * kWidth), most[part]);
        largest = Lanes::larger(Lanes::larger(most[0], most[1]), Lanes::larger(most[2], most[3])).largest();
    }
    for (; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

static inline float smallest_of(const float* x, int64_t count) {
    float smallest = std::numeric_limits<float>::infinity();
    int64_t i = 0;
    if (count >= kWidth) {
        Lanes most = Lanes::splat(-smallest);
        for (; i + kWidth <= count; i += kWidth)
            most = Lanes::larger(Lanes::subtract(Lanes::splat(0), Lanes::load(x + i)), most);
        smallest = -most.largest();
    }
    for (; i < count; ++i) smallest = x[i] < smallest ? x[i] : smallest;
    return smallest;
}

// Sums of 1,024 floats, added up in float64.
static inline double total_of(const float* x, int64_t count) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += 1024) {
        const int64_t end = std::min(count, first + 1024);
        Lanes sums[2] = {Lanes::splat(0), Lanes::splat(0)};
        int64_t i = first;
        for (; i + 2 * kWidth <= end; i += 2 * kWidth)
            for (int part = 0; part < 2; ++part)
                sums[part] = Lanes::add(sums[part], Lanes::load(x + i + part * kWidth));
        total += double(Lanes::add(sums[0], sums[1]).total());
        for (; i < end; ++i) total += double(x[i]);
    }
    return total;
}

// How many are neither NaN nor infinity; minus infinity is a logit like others.
static inline int64_t count_good(const float* x, int64_t count) {
    int32_t good = 0;
    for (int64_t i = 0; i < count; ++i) good += x[i] < std::numeric_limits<float>::infinity();
    return good;
}

static inline void exponentials(const float* __restrict y, int64_t count, float largest, float scale,
                                float* __restrict e) {
    for (int64_t i = 0; i < count; ++i) e[i] = exponential((y[i] - largest) * scale);
}

// Philox-4x32-10 (Salmon et al. 2011) of consecutive blocks, keyed by the seed. Only the low halves of the numbers are
// read; what is left in the high ones saves masking. `planes` is for the words of all blocks, one after the other.
static void philox(const Draw& draw, int64_t blocks, uint32_t* planes, uint32_t* words) {
    constexpr int kBlocks = kWidth;
    const int64_t pitch = (blocks + kBlocks - 1) / kBlocks * kBlocks;
    for (int64_t first = 0; first < blocks; first += kBlocks) {
        uint64_t a[kBlocks], b[kBlocks], c[kBlocks], d[kBlocks];
        uint64_t key0 = uint64_t(draw.seed) & kWord, key1 = uint64_t(draw.seed) >> 32;
        for (int j = 0; j < kBlocks; ++j) {
            a[j] = uint64_t(first + j), b[j] = uint64_t(draw.level);
            c[j] = uint64_t(draw.step) & kWord, d[j] = uint64_t(draw.step) >> 32;
        }
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            for (int j = 0; j < kBlocks; ++j) {
                const uint64_t low = (a[j] & kWord) * 0xd2511f53u, high = (c[j] & kWord) * 0xcd9e8d57u;
                a[j] = (high >> 32) ^ b[j] ^ key0, b[j] = high;
                c[j] = (low >> 32) ^ d[j] ^ key1, d[j] = low;
            }
            key0 = (key0 + 0x9e3779b9u) & kWord, key1 = (key1 + 0xbb67ae85u) & kWord;
        }
        uint32_t* to = planes + first;
        for (int j = 0; j < kBlocks; ++j) to[j] = uint32_t(a[j]);
        for (int j = 0; j < kBlocks; ++j) to[pitch + j] = uint32_t(b[j]);
        for (int j = 0; j < kBlocks; ++j) to[2 * pitch + j] = uint32_t(c[j]);
        for (int j = 0; j < kBlocks; ++j) to[3 * pitch + j] = uint32_t(d[j]);
    }
    const uint32_t* __restrict one = planes;
    const uint32_t* __restrict two = one + pitch;
    const uint32_t* __restrict three = two + pitch;
    const uint32_t* __restrict four = three + pitch;
    uint32_t* __restrict to = words;
    for (int64_t j = 0; j < blocks; ++j)
        to[4 * j] = one[j], to[4 * j + 1] = two[j], to[4 * j + 2] = three[j], to[4 * j + 3] = four[j];
}

// -log1p(-u) of u = (word + 0.5) / 2^32 within a share of 2^-20: 1 - u = 2^k (1 + d), d in [-0.25, 0.5), and log(1 + d)
// is d times a polynomial (fitted by least squares on Chebyshev nodes); where k = 0, d is -u.
static inline float exponential_variate(uint32_t word) {
    const float u = (float(word) + 0.5f) * 0x1p-32f, left = (float(~word) + 0.5f) * 0x1p-32f;
    const int32_t bits = int32_t(bits_of(left)), k = (bits - 0x3f400000) >> 23;
    const float m = float_of(uint32_t(bits - int32_t(uint32_t(k) << 23)));
    const uint32_t is_near = k == 0 ? ~0u : 0u;
    const float d = float_of((bits_of(-u) & is_near) | (bits_of(m - 1.0f) & ~is_near));
    float p = -0.0648929551243782f;
    p = p * d + 0.1398954540491104f;
    p = p * d - 0.1735534518957138f;
    p = p * d + 0.201212078332901f;
    p = p * d - 0.24979110062122345f;
    p = p * d + 0.3332943320274353f;
    p = p * d - 0.5000017285346985f;
    p = p * d + 1.0000001192092896f;
    return -(float(k) * 0.693147181f) - p * d;
}

static inline double gumbel_noise(uint32_t word) { return -std::log(-std::log1p(-(double(word) + 0.5) * 0x1p-32)); }

static inline void race(const float* __restrict e, const uint32_t* __restrict words, int64_t count,
                        float* __restrict score) {
    for (int64_t i = 0; i < count; ++i) score[i] = e[i] / exponential_variate(words[i]);
}

constexpr int64_t kEvery = std::numeric_limits<int64_t>::max();

// Where a prefix of the ids in descending order of y ends: all above `last`, and the first `equals` of those equal
// to it.
struct Cut {
    float last;
    int64_t equals;

    bool is_tighter(const Cut& other) const {
        return last > other.last || (last == other.last && equals < other.equals);
    }
};

// The numbers of `from` whose bits are set, one after the other; more may be written after them.
static inline void append(const void* from, uint32_t mask, void* to) {
#if LC_AVX512
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(from)));
#else
    for (auto* out = static_cast<uint32_t*>(to); mask != 0; mask &= mask - 1)
        *out++ = static_cast<const uint32_t*>(from)[__builtin_ctz(mask)];
#endif
}

// A list of values with their masses.
struct Values {
    const float *y, *e;
    int64_t count;
};

// How many, and their mass.
struct Tally {
    double ids, mass;
};

static Tally tally(const Values& list, float pivot) {
    Tally found{0, 0};
    const Lanes least = Lanes::splat(pivot), one = Lanes::splat(1);
    for (int64_t first = 0; first < list.count; first += 1024) {  // sums of 1,024 floats, added up in float64
        const int64_t end = std::min(list.count, first + 1024);
        Lanes ids[2] = {Lanes::splat(0), Lanes::splat(0)}, mass[2] = {Lanes::splat(0), Lanes::splat(0)};
        int64_t i = first;
        for (; i + 2 * kWidth <= end; i += 2 * kWidth)
            for (int part = 0; part < 2; ++part) {
                const Lanes y = Lanes::load(list.y + i + part * kWidth), e = Lanes::load(list.e + i + part * kWidth);
                ids[part] = Lanes::add(ids[part], Lanes::where_not_below(y, least, one));
                mass[part] = Lanes::add(mass[part], Lanes::where_not_below(y, least, e));
            }
        found.ids += double(Lanes::add(ids[0], ids[1]).total());
        found.mass += double(Lanes::add(mass[0], mass[1]).total());
        for (; i < end; ++i)
            if (list.y[i] >= pivot) found.ids += 1, found.mass += double(list.e[i]);
    }
    return found;
}

// Those in [low, high), written to y and e, which may be where the list stands.
static Values between(const Values& list, float low, float high, float* y, float* e) {
    int64_t count = 0;
    for (int64_t i = 0; i < list.count; i += kWidth) {
        const Lanes value = Lanes::load(list.y + i);
        uint32_t mask = Lanes::not_below(value, Lanes::splat(low)) & ~Lanes::not_below(value, Lanes::splat(high));
        if (i + kWidth > list.count) mask &= (1u << (list.count - i)) - 1;
        append(list.y + i, mask, y + count), append(list.e + i, mask, e + count);
        count += __builtin_popcount(mask);
    }
    return {y, e, count};
}

// Floats in their order, as integers.
static inline int64_t ordered(float x) {
    const int32_t bits = int32_t(bits_of(x + 0.0f));
    return bits < 0 ? int64_t(INT32_MIN) - bits : bits;
}

static inline float of_ordered(int64_t number) {
    return float_of(uint32_t(number < 0 ? int32_t(INT32_MIN - number) : int32_t(number)));
}

// A number in (low, high): that of the value halfway, or halfway itself, so that no search takes long.
static inline int64_t middle(int64_t low, int64_t high, bool by_value) {
    const int64_t pivot = ordered(0.5f * of_ordered(low) + 0.5f * of_ordered(high));
    return by_value && pivot > low && pivot < high ? pivot : (low + high) >> 1;
}

// The end of the shortest prefix that has `count` ids or `mass`; y and e are room for a list.
static Cut cut_at(Values list, double count, double mass, float* y, float* e) {
    int64_t low = ordered(smallest_of(list.y, list.count)), high = ordered(largest_of(list.y, list.count)) + 1;
    Tally above{0, 0}, gone{0, 0}, inside{double(list.count), 0};  // at least high; left out of the list; from low on
    for (int step = 1; high - low > 1; ++step) {
        const int64_t pivot = middle(low, high, step % 4 != 0);
        const Tally part = tally(list, of_ordered(pivot)), from{gone.ids + part.ids, gone.mass + part.mass};
        if (from.ids >= count || from.mass >= mass)
            low = pivot, inside = from;
        else
            high = pivot, above = from;
        if (list.count > 4 * kWidth && 4 * (inside.ids - above.ids) < double(list.count)) {
            list = between(list, of_ordered(low), of_ordered(high), y, e);
            gone = above;
        }
    }
    const float last = of_ordered(low);
    const auto at = std::find(list.y, list.y + list.count, last);
    const double each = at < list.y + list.count ? double(list.e[at - list.y]) : 1.0;
    const double equals = std::min(count - above.ids, std::ceil((mass - above.mass) / each));
    return {last, equals < inside.ids - above.ids ? std::max<int64_t>(0, int64_t(equals)) : kEvery};
}

// The least float y with exp((y - m) / T) >= share, in float64.
static Cut cut_by_share(float largest, double temperature, double share) {
    const auto is_kept = [&](float y) { return std::exp((double(y) - double(largest)) / temperature) >= share; };
    int64_t at = ordered(float(double(largest) + temperature * std::log(share)));
    while (!is_kept(of_ordered(at))) ++at;
    while (is_kept(of_ordered(at - 1))) --at;
    return {of_ordered(at), kEvery};
}

// What a draw works on.
struct Scores {
    const float* y;
    int64_t limit, pitch;
    float largest;  // of the ids below the limit
    double temperature;
    float* room;

    float* at(int number) const { return room + number * pitch; }
    float* e() const { return at(1); }
    uint32_t* words() const { return reinterpret_cast<uint32_t*>(at(2)); }
};

static bool is_kept(const Scores& s, const Cut& cut, int64_t id) {
    if (id >= s.limit || s.y[id] != cut.last) return id < s.limit && s.y[id] > cut.last;
    return std::count(s.y, s.y + id, cut.last) < cut.equals;
}

static double kept_mass(const Scores& s, const Cut& cut) {
    const Values list{s.y, s.e(), s.limit};
    if (cut.equals == kEvery) return tally(list, cut.last).mass;
    const double each = double(s.e()[std::find(s.y, s.y + s.limit, cut.last) - s.y]);
    return tally(list, of_ordered(ordered(cut.last) + 1)).mass + double(cut.equals) * each;
}

// Where truncation ends.
static Cut truncated(const Scores& s, const float* params) {
    const double top_k = params[1], top_p = params[2], min_p = params[3];
    const bool is_joint = params[7] != 0.0f;
    constexpr double kAll = std::numeric_limits<double>::infinity();
    Cut cut{-std::numeric_limits<float>::infinity(), kEvery};
    const auto tighten = [&](const Cut& other) { cut = other.is_tighter(cut) ? other : cut; };
    const Values list{s.y, s.e(), s.limit};
    if (top_k >= 1 && top_k < double(s.limit)) tighten(cut_at(list, top_k, kAll, s.at(3), s.at(4)));
    if (top_p < 1) {
        const double mass = is_joint || cut.last == -std::numeric_limits<float>::infinity() ? total_of(s.e(), s.limit)
                                                                                            : kept_mass(s, cut);
        tighten(cut_at(list, kAll, top_p * mass, s.at(3), s.at(4)));
    }
    if (min_p > 0) tighten(cut_by_share(s.largest, s.temperature, min_p));
    return cut;
}

// The ids that are kept, in order, with their masses and words.
struct Kept {
    const float* e;
    const uint32_t* words;
    const int32_t* ids;  // null: all
    int64_t count;
};

static Kept keep(const Scores& s, const Cut& cut) {
    if (cut.last == -std::numeric_limits<float>::infinity()) return {s.e(), s.words(), nullptr, s.limit};
    float* e = s.at(3);
    auto *words = reinterpret_cast<uint32_t*>(s.at(4)), *ids = reinterpret_cast<uint32_t*>(s.at(5));
    int64_t count = 0, equals = cut.equals;
    uint32_t numbers[kWidth];
    for (int64_t i = 0; i < s.limit; i += kWidth) {
        uint32_t mask = Lanes::not_below(Lanes::load(s.y + i), Lanes::splat(cut.last));
        if (i + kWidth > s.limit) mask &= (1u << (s.limit - i)) - 1;
        if (mask == 0) continue;
        for (uint32_t left = equals < kEvery ? mask : 0; left != 0; left &= left - 1) {
            const int bit = __builtin_ctz(left);
            if (s.y[i + bit] == cut.last && equals-- <= 0) mask &= ~(1u << bit);
        }
        for (int j = 0; j < kWidth; ++j) numbers[j] = uint32_t(i + j);
        append(s.e() + i, mask, e + count), append(s.words() + i, mask, words + count);
        append(numbers, mask, ids + count);
        count += __builtin_popcount(mask);
    }
    return {e, words, reinterpret_cast<const int32_t*>(ids), count};
}

static int64_t drawn_id(const Scores& s, const Kept& kept) {
    float* scores = s.at(6);
    race(kept.e, kept.words, kept.count, scores);
    const float near = largest_of(scores, kept.count) * (1.0f - 0x1p-10f);
    int64_t best = 0;
    double best_value = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < kept.count; i += kWidth) {
        uint32_t mask = Lanes::not_below(Lanes::load(scores + i), Lanes::splat(near));
        for (; mask != 0; mask &= mask - 1) {
            const int64_t at = i + __builtin_ctz(mask);
            if (at >= kept.count) break;
            const int64_t id = kept.ids == nullptr ? at : kept.ids[at];
            const double value = double(s.y[id]) / s.temperature + gumbel_noise(kept.words[at]);
            if (value > best_value) best_value = value, best = id;
        }
    }
    return best;
}

// The draw at a temperature above zero: the id, and its logprob among what is kept. At temperature 1 the masses may be
// there already.
static void draw_id(const Draw& d, const Scores& s, bool has_masses, Drawn& out) {
    if (s.largest == -std::numeric_limits<float>::infinity()) {  // no id is left
        out = {std::max<int64_t>(d.forced, 0), 0.0f, s.largest};
        return;
    }
    const float scale = std::min(float(1.0 / s.temperature), std::numeric_limits<float>::max());
    if (!has_masses) exponentials(s.y, s.limit, s.largest, scale, s.e());
    const Cut cut = truncated(s, d.params);
    double mass;
    if (d.forced < 0) {
        philox(d, (s.limit + 3) / 4, reinterpret_cast<uint32_t*>(s.at(3)), s.words());
        const Kept kept = keep(s, cut);
        out.code = drawn_id(s, kept);
        mass = total_of(kept.e, kept.count);
    } else {
        mass = kept_mass(s, cut);
    }
    const double relative = (double(s.y[out.code]) - double(s.largest)) / s.temperature;
    out.drawn_logprob = -std::numeric_limits<float>::infinity();
    if (d.forced < 0 || is_kept(s, cut, out.code)) out.drawn_logprob = float(relative - std::log(mass));
}

static void penalise(const Draw& d, const float* c, float* y) {
    std::copy_n(c, d.classes, y);
    const float penalty = d.params[4];
    for (int64_t i = 0; i < d.history_count; ++i) {
        const int64_t id = d.history[i * d.history_pitch];
        if (id >= 0 && id < d.classes) y[id] = c[id] < 0.0f ? c[id] * penalty : c[id] / penalty;
    }
}

static Drawn draw_code(const Draw& d, float* room) {
    Scores s{d.logits, d.classes - int64_t(d.params[5]), d.classes + 64, 0.0f, double(d.params[0]), room};
    const float* c = d.logits;
    if (d.others != nullptr) {
        float* __restrict mixed = s.at(7);
        for (int64_t i = 0; i < d.classes; ++i) mixed[i] = d.params[6] * (d.logits[i] - d.others[i]) + d.others[i];
        c = mixed;
    }
    const float most = largest_of(c, d.classes);
    if (count_good(c, d.classes) != d.classes || most == -std::numeric_limits<float>::infinity()) {
        const float lost = std::numeric_limits<float>::quiet_NaN();
        return {std::max<int64_t>(d.forced, 0), lost, lost};
    }
    exponentials(c, d.classes, most, 1.0f, s.e());
    const double sum = double(most) + std::log(total_of(s.e(), d.classes));
    s.y = c;
    if (d.history_count > 0 && d.params[4] != 1.0f) {
        penalise(d, c, s.at(0));
        s.y = s.at(0);
    }
    s.largest = largest_of(s.y, s.limit);
    Drawn out{d.forced, 0.0f, 0.0f};
    if (s.temperature > 0) {
        draw_id(d, s, s.temperature == 1.0 && s.y == c && s.largest == most, out);
    } else {
        const int64_t id = std::find(s.y, s.y + s.limit, s.largest) - s.y;
        if (d.forced < 0) out.code = id;
        out.drawn_logprob = out.code == id ? 0.0f : -std::numeric_limits<float>::infinity();
    }
    out.logprob = float(double(c[out.code]) - sum);
    return out;
}
