// The inner loop of rvq_decode for one instruction set. Included once for each, inside its namespace and target. No
// include guard: see rvq_decode.cpp.

// out = the sum of `words`, in their order. Those of `ahead`, which come next, are sent for: they lie anywhere.
static void sum_words(const Words& words, const Words& ahead, int64_t dim, float* out) {
    constexpr int kLanes = 4;
    constexpr int64_t kBlock = kLanes * Lanes::kWidth, kLine = 16;
    int64_t d = 0;
    for (; d + kBlock <= dim; d += kBlock) {
        for (const float* word : ahead)
            for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(word + d + i);
        Lanes sum[kLanes];
        for (Lanes& lanes : sum) lanes = Lanes::splat(0);
        for (const float* word : words)
            for (int i = 0; i < kLanes; ++i) sum[i] = Lanes::add(sum[i], Lanes::load(word + d + i * Lanes::kWidth));
        for (int i = 0; i < kLanes; ++i) sum[i].store(out + d + i * Lanes::kWidth);
    }
    for (; d < dim; ++d) {
        float sum = 0;
        for (const float* word : words) sum += word[d];
        out[d] = sum;
    }
}
