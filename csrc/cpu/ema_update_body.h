// The inner loops of ema_update for one instruction set. Included once for each, inside its namespace and target, after
// `Doubles`. No include guard: see ema_update.cpp.

static inline Doubles doubles_at(const float* from) { return Doubles::load(from); }
static inline Doubles doubles_at(const BFloat16* from) { return Doubles::load(from); }
static inline Doubles doubles_at(const Float16* from) {
    float floats[Doubles::kWidth];
    for (int i = 0; i < Doubles::kWidth; ++i) floats[i] = to_float(from[i]);
    return Doubles::load(floats);
}

constexpr int64_t kBlock = 32;  // elements between two requests: a cache line or two of each row

// Rows that are added together, in their order, and those that are sent for meanwhile: rows lie anywhere.
template <class T, int kRows>
struct RowGroup {
    const T* row[kRows + 1];  // one more: an array must not be empty
    const T* later[kRows + 1];

    RowGroup(const EmaUpdate& p, const Segments& rows, const int64_t* order) {
        const int64_t* last = rows.order.data() + rows.order.size() - 1;
        for (int i = 0; i < kRows; ++i) {
            row[i] = vector_of<T>(p, order[i]);
            later[i] = vector_of<T>(p, *std::min(order + i + kAhead, last));
        }
    }

    void send_for(int64_t d) const {
        for (int i = 0; i < kRows; ++i)
            for (int64_t line = 0; line < kBlock; line += kLine / int64_t(sizeof(T)))
                __builtin_prefetch(later[i] + d + line, 0, 2);
    }

    Doubles add_to(Doubles sum, int64_t d) const {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum = Doubles::add(sum, doubles_at(row[i] + d));
        return sum;
    }

    double add_to(double sum, int64_t d) const {
        for (int i = 0; i < kRows; ++i) sum += double(to_float(row[i][d]));
        return sum;
    }
};

template <class T>
static void add_four(const EmaUpdate& p, const RowGroup<T, 4>& rows, double* sum) {
    int64_t d = 0;
    for (; d + kBlock <= p.dim; d += kBlock) {
        rows.send_for(d);
#pragma GCC unroll 8
        for (int64_t i = d; i < d + kBlock; i += Doubles::kWidth) rows.add_to(Doubles::load(sum + i), i).store(sum + i);
    }
    for (; d < p.dim; ++d) sum[d] = rows.add_to(sum[d], d);
}

// Moves the statistics of entry k towards `rows`, after those in `sum` where kSummed; the codeword follows, unless the
// inverse size is zero.
template <bool kSummed, class T, int kRows>
static void move_by(const EmaUpdate& p, const RowGroup<T, kRows>& rows, const double* sum, int64_t k,
                    double inverse_size) {
    float *embed = p.embed + k * p.dim, *ema = p.embed_ema + k * p.dim;
    const double decay = p.decay, rest = 1 - p.decay;
    const Doubles decays = Doubles::splat(decay), rests = Doubles::splat(rest), inverse = Doubles::splat(inverse_size);
    int64_t d = 0;
    for (; d + kBlock <= p.dim && inverse_size != 0; d += kBlock) {
        rows.send_for(d);
#pragma GCC unroll 8
        for (int64_t i = d; i < d + kBlock; i += Doubles::kWidth) {
            const Doubles total = rows.add_to(kSummed ? Doubles::load(sum + i) : Doubles::splat(0), i);
            const Doubles kept = Doubles::multiply(decays, Doubles::load(ema + i));
            const Doubles moved = Doubles::add(kept, Doubles::multiply(rests, total)).rounded();
            moved.store(ema + i);
            Doubles::multiply(moved, inverse).store(embed + i);
        }
    }
    for (; d < p.dim; ++d) {
        ema[d] = float(decay * double(ema[d]) + rest * rows.add_to(kSummed ? sum[d] : 0.0, d));
        if (inverse_size != 0) embed[d] = float(double(ema[d]) * inverse_size);
    }
}

template <class T, int kRows>
static void move_last(const EmaUpdate& p, const Segments& rows, const int64_t* order, const double* sum, int64_t k,
                      double inverse_size) {
    const RowGroup<T, kRows> group(p, rows, order);
    if (sum == nullptr) return move_by<false>(p, group, sum, k, inverse_size);
    move_by<true>(p, group, sum, k, inverse_size);
}

// Moves entry k by its rows; most entries have few, which need no sum in memory: `room` has space for one.
template <class T>
static void move_entry(const EmaUpdate& p, const Segments& rows, int64_t k, double inverse_size, double* room) {
    const int64_t *order = rows.begin(k), *end = rows.end(k);
    const double* sum = nullptr;
    if (end - order > 4) std::fill(room, room + p.dim, 0.0), sum = room;
    for (; end - order > 4; order += 4) add_four<T>(p, {p, rows, order}, room);
    if (end - order == 0) return move_last<T, 0>(p, rows, order, sum, k, inverse_size);
    if (end - order == 1) return move_last<T, 1>(p, rows, order, sum, k, inverse_size);
    if (end - order == 2) return move_last<T, 2>(p, rows, order, sum, k, inverse_size);
    if (end - order == 3) return move_last<T, 3>(p, rows, order, sum, k, inverse_size);
    move_last<T, 4>(p, rows, order, sum, k, inverse_size);
}

static MoveEntry move_entry_of(DType dtype) {
    if (dtype == DType::float32) return move_entry<float>;
    return dtype == DType::bfloat16 ? move_entry<BFloat16> : move_entry<Float16>;
}

// Of each entry, what makes its moving sum a codeword; 0: there is nothing to divide by.
static void invert_sizes(const EmaUpdate& p, double total, double smoothed, double* inverse_size) {
    const float* sizes = p.cluster_size_ema;
    for (int64_t k = 0; k < p.entries; ++k) {
        const double size = total * (double(sizes[k]) + p.eps) / smoothed, inverse = 1 / size;
        inverse_size[k] = size > 0 ? inverse : 0;
    }
}
