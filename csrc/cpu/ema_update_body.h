// The inner loops of ema_update for one instruction set. Included once for each, inside its namespace and target. No
// include guard: see ema_update.cpp.

// Moves the statistics of entry k towards `sum`, called with an element's index; the codeword follows, unless the
// inverse size is zero.
template <class Sum>
static inline void move(const EmaUpdate& p, int64_t k, double inverse_size, const Sum& sum) {
    float* __restrict embed = p.embed + k * p.dim;
    float* __restrict ema = p.embed_ema + k * p.dim;
    const double decay = p.decay, rest = 1 - p.decay;
    const int64_t dim = p.dim;
    if (inverse_size == 0) {
        for (int64_t d = 0; d < dim; ++d) ema[d] = float(decay * double(ema[d]) + rest * sum(d));
        return;
    }
    for (int64_t d = 0; d < dim; ++d) {
        const float moved = float(decay * double(ema[d]) + rest * sum(d));
        ema[d] = moved;
        embed[d] = float(double(moved) * inverse_size);
    }
}

template <class T>
static inline const T* vector_of(const EmaUpdate& p, int64_t row) {
    return static_cast<const T*>(p.vectors) + row * p.row_stride;
}

// Moves entry k by `kCount` rows in their order, after those in `sum` where that is not null.
template <class T, int kCount>
static void move_by(const EmaUpdate& p, const int64_t* rows, int64_t k, double inverse_size, const double* sum) {
    const T* __restrict a = vector_of<T>(p, rows[0]);
    const T* __restrict b = vector_of<T>(p, rows[kCount > 1 ? 1 : 0]);
    const T* __restrict c = vector_of<T>(p, rows[kCount > 2 ? 2 : 0]);
    const T* __restrict e = vector_of<T>(p, rows[kCount > 3 ? 3 : 0]);
    const auto with = [=](double total, int64_t d) {
        total += double(to_float(a[d]));
        if (kCount > 1) total += double(to_float(b[d]));
        if (kCount > 2) total += double(to_float(c[d]));
        if (kCount > 3) total += double(to_float(e[d]));
        return total;
    };
    if (sum == nullptr)
        move(p, k, inverse_size, [=](int64_t d) { return with(0.0, d); });
    else
        move(p, k, inverse_size, [=](int64_t d) { return with(sum[d], d); });
}

// Adds four rows to `sum`, in their order: it is read and written once for all.
template <class T>
static void add_four(const EmaUpdate& p, const int64_t* rows, double* __restrict sum) {
    const T* __restrict a = vector_of<T>(p, rows[0]);
    const T* __restrict b = vector_of<T>(p, rows[1]);
    const T* __restrict c = vector_of<T>(p, rows[2]);
    const T* __restrict e = vector_of<T>(p, rows[3]);
    for (int64_t d = 0; d < p.dim; ++d)
        sum[d] = (((sum[d] + double(to_float(a[d]))) + double(to_float(b[d]))) + double(to_float(c[d]))) +
                 double(to_float(e[d]));
}

// Moves entry k by its rows [first, last); most entries have few, which need no sum in memory.
template <class T>
static void move_entry(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                       double* sum) {
    if (first == last) return move(p, k, inverse_size, [](int64_t) { return 0.0; });
    const double* before = nullptr;
    if (last - first > 4) std::fill(sum, sum + p.dim, 0.0), before = sum;
    for (; last - first > 4; first += 4) add_four<T>(p, first, sum);
    if (last - first == 1) return move_by<T, 1>(p, first, k, inverse_size, before);
    if (last - first == 2) return move_by<T, 2>(p, first, k, inverse_size, before);
    if (last - first == 3) return move_by<T, 3>(p, first, k, inverse_size, before);
    move_by<T, 4>(p, first, k, inverse_size, before);
}

static void move_entry_of(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                          double* sum) {
    if (p.dtype == DType::float32) move_entry<float>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::bfloat16) move_entry<BFloat16>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::float16) move_entry<Float16>(p, first, last, k, inverse_size, sum);
}
