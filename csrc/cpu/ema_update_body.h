// The inner loops of ema_update for one instruction set. Included once for each, inside its namespace and target. No
// include guard: see ema_update.cpp.

// sum += row
template <class T>
static void add_row(double* sum, const T* row, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += double(to_float(row[d]));
}

// ema moves towards the sum; embed follows. An inverse size of zero leaves embed alone.
static void move(float* __restrict embed, float* __restrict ema, const double* __restrict sum, int64_t dim,
                 double decay, double inverse_size) {
    for (int64_t d = 0; d < dim; ++d) ema[d] = float(decay * double(ema[d]) + (1 - decay) * sum[d]);
    if (inverse_size == 0) return;
    for (int64_t d = 0; d < dim; ++d) embed[d] = float(double(ema[d]) * inverse_size);
}

// The same for an entry without rows, in one pass.
static void decay_only(float* __restrict embed, float* __restrict ema, int64_t dim, double decay, double inverse_size) {
    for (int64_t d = 0; d < dim; ++d) {
        const float moved = float(decay * double(ema[d]));
        ema[d] = moved;
        embed[d] = float(double(moved) * inverse_size);
    }
}

template <class T>
static void move_entry(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                       double* sum) {
    float *embed = p.embed + k * p.dim, *ema = p.embed_ema + k * p.dim;
    if (first == last && inverse_size != 0) return decay_only(embed, ema, p.dim, p.decay, inverse_size);
    std::fill(sum, sum + p.dim, 0.0);
    for (; first != last; ++first) add_row(sum, static_cast<const T*>(p.vectors) + *first * p.row_stride, p.dim);
    move(embed, ema, sum, p.dim, p.decay, inverse_size);
}

static void move_entry_of(const EmaUpdate& p, const int64_t* first, const int64_t* last, int64_t k, double inverse_size,
                          double* sum) {
    if (p.dtype == DType::float32) move_entry<float>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::bfloat16) move_entry<BFloat16>(p, first, last, k, inverse_size, sum);
    if (p.dtype == DType::float16) move_entry<Float16>(p, first, last, k, inverse_size, sum);
}
