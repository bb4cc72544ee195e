// The inner loop of rvq_decode for one instruction set. Included once for each, inside its namespace and target. No
// include guard: see rvq_decode.cpp.

// out = the sum of the words [word, last), in their order. Those `kAhead` further on are sent for: they lie anywhere.
static void sum_words(const float* const* word, const float* const* last, int64_t dim, float* out) {
    constexpr int kLanes = 8;
    constexpr int64_t kBlock = kLanes * Lanes::kWidth, kLine = 16;
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock) {
        Lanes sum[kLanes];
        for (Lanes& lanes : sum) lanes = Lanes::splat(0);
        for (const float* const* w = word; w != last; ++w) {
            for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(w[kAhead] + d + i);
            for (int i = 0; i < kLanes; ++i) sum[i] = Lanes::add(sum[i], Lanes::load(*w + d + i * Lanes::kWidth));
        }
        for (int i = 0; i < kLanes; ++i) sum[i].store(out + d + i * Lanes::kWidth);
    }
    for (; d + Lanes::kWidth <= dim; d += Lanes::kWidth) {
        Lanes sum = Lanes::splat(0);
        for (const float* const* w = word; w != last; ++w) {
            __builtin_prefetch(w[kAhead] + d);
            sum = Lanes::add(sum, Lanes::load(*w + d));
        }
        sum.store(out + d);
    }
    for (; d < dim; ++d) {
        float sum = 0;
        for (const float* const* w = word; w != last; ++w) sum += (*w)[d];
        out[d] = sum;
    }
}
