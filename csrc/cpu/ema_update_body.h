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

// Moves entry k by its rows [first, last); most entries have none or one, which needs no sum in memory.
template <class T>
static void move_entry(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                       double* __restrict sum) {
    const auto row = [&](const int64_t* index) { return static_cast<const T*>(p.vectors) + *index * p.row_stride; };
    if (first == last) return move(p, k, inverse_size, [](int64_t) { return 0.0; });
    const T* __restrict one = row(first);
    if (last - first == 1) return move(p, k, inverse_size, [=](int64_t d) { return double(to_float(one[d])); });
    for (int64_t d = 0; d < p.dim; ++d) sum[d] = double(to_float(one[d]));
    ++first;
    for (; last - first >= 4; first += 4) {  // four rows a pass, in their order: the sum is read and written once
        const T* __restrict a = row(first);
        const T* __restrict b = row(first + 1);
        const T* __restrict c = row(first + 2);
        const T* __restrict e = row(first + 3);
        for (int64_t d = 0; d < p.dim; ++d)
            sum[d] = (((sum[d] + double(to_float(a[d]))) + double(to_float(b[d]))) + double(to_float(c[d]))) +
                     double(to_float(e[d]));
    }
    for (; first != last; ++first) {
        const T* __restrict next = row(first);
        for (int64_t d = 0; d < p.dim; ++d) sum[d] += double(to_float(next[d]));
    }
    move(p, k, inverse_size, [=](int64_t d) { return sum[d]; });
}

static void move_entry_of(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                          double* sum) {
    if (p.dtype == DType::float32) move_entry<float>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::bfloat16) move_entry<BFloat16>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::float16) move_entry<Float16>(p, first, last, k, inverse_size, sum);
}
