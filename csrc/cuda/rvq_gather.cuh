// Sums of codewords, and the gradient through the residuals: a thread an element.
#pragma once

#include "cuda/rvq_params.cuh"

namespace longcat::cuda {

// The codeword a code names, or null: a code out of range adds nothing, as a negative one.
LC_DEVICE const float* named_word(const LevelWords& book, i64 code) {
    return code >= 0 && code < book.entries ? book.words + code * book.stride : nullptr;
}

}  // namespace longcat::cuda

LC_KERNEL(longcat::cuda::kGatherThreads) rvq_gather(LC_PARAMS(longcat::cuda::RvqGather) p) {
    using namespace longcat::cuda;
    const i64 t = block_index();
    const i64* codes = p.codes + t * p.row_stride;
    const int d = int(block_index_y() * kGatherThreads + thread_index());
    if (d >= p.dim) return;
    float sum = 0;
    for (int level = 0; level < p.levels; ++level) {
        const float* word = named_word(p.books[level], codes[level * p.level_stride]);
        if (word != nullptr) sum += word[d];
    }
    store(p.out, p.type, t * p.dim + d, sum);
}

LC_KERNEL(longcat::cuda::kGatherThreads) rvq_backward(LC_PARAMS(longcat::cuda::RvqBackward) p) {
    using namespace longcat::cuda;
    const i64 t = block_index();
    const int d = int(block_index_y() * kGatherThreads + thread_index());
    if (d >= p.dim) return;
    const i64* codes = p.codes + t * p.levels;
    float total = 0;
    if (codes[0] >= 0) {
        if (p.grad.data != nullptr) total = p.grad.at(p.type, t, d);
        float residual = round_to(p.residual_type, p.x.at(p.type, t, d));
        for (int level = 0; level < p.levels && p.scales != nullptr; ++level) {
            const float* word = named_word(p.books[level], codes[level]);
            residual = round_to(p.residual_type, residual - (word == nullptr ? 0.0f : word[d]));
            total += p.scales[level] * residual;
        }
    }
    store(p.out, p.type, t * p.dim + d, total);
}
