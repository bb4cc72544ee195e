// Packing a codebook: layouts.HalfLayout from the codewords, in four launches.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/rvq_params.cuh"

namespace longcat::cuda {

constexpr int kPackWarps = int(kPackThreads / kWarp);

}  // namespace longcat::cuda

// Norms in the order of the definition, a warp a codeword; the greatest element.
LC_KERNEL(longcat::cuda::kPackThreads) rvq_pack_norm(LC_PARAMS(longcat::cuda::RvqPack) p) {
    using namespace longcat::cuda;
    const Codebook& book = p.book;
    const int k = int(block_index()) * kPackWarps + int(thread_index() / kWarp);
    if (k >= book.padded_entries) return;
    const float* word = book.words + k * book.stride;
    double norm = k < book.entries ? tree_dot(word, word, book.dim) : double_infinity();
    const bool usable = is_finite(norm);
    float largest = 0;
    if (usable)
        for (int d = int(lane_index()); d < book.dim; d += int(kWarp)) largest = fmaxf(largest, fabsf(word[d]));
    largest = warp_max(largest);
    if (lane_index() != 0) return;
    book.norm[k] = usable ? norm : double_infinity();
    atomic_max(p.largest, int(bits_of(largest)));  // floats that are not negative are ordered as their bits
}

// Sums of the usable codewords of one chunk; a thread a column. Column `dim` counts them.
LC_KERNEL(longcat::cuda::kPackThreads) rvq_pack_sum(LC_PARAMS(longcat::cuda::RvqPack) p) {
    using namespace longcat::cuda;
    const Codebook& book = p.book;
    const int d = int(block_index()) * int(kPackThreads) + int(thread_index()), chunk = int(block_index_y());
    if (d > book.dim) return;
    const int first = int(i64(chunk) * book.entries / p.chunks), end = int(i64(chunk + 1) * book.entries / p.chunks);
    double sum = 0;
    for (int k = first; k < end; ++k)
        if (is_finite(book.norm[k])) sum += d == book.dim ? 1.0 : double(book.words[k * book.stride + d]);
    p.sums[i64(chunk) * (book.dim + 1) + d] = sum;
}

LC_KERNEL(longcat::cuda::kPackThreads) rvq_pack_centre(LC_PARAMS(longcat::cuda::RvqPack) p) {
    using namespace longcat::cuda;
    const Codebook& book = p.book;
    const int d = int(block_index()) * int(kPackThreads) + int(thread_index());
    if (d >= book.dim) return;
    double sum = 0, count = 0;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
        sum += p.sums[i64(chunk) * (book.dim + 1) + d];
        count += p.sums[i64(chunk) * (book.dim + 1) + book.dim];
    }
    book.centre[d] = count > 0 ? float(sum / count) : 0.0f;
    // No difference from the centre is longer than twice the greatest element.
    const float largest = float_of(u32(*p.largest));
    if (d == 0) *book.exponent = is_extreme(largest) ? 0 : scaling_exponent(largest) - 1;
}

// Words and what bounds their rounding, a warp a codeword.
LC_KERNEL(longcat::cuda::kPackThreads) rvq_pack_words(LC_PARAMS(longcat::cuda::RvqPack) p) {
    using namespace longcat::cuda;
    const Codebook& book = p.book;
    const int k = int(block_index()) * kPackWarps + int(thread_index() / kWarp);
    if (k >= book.padded_entries) return;
    const bool usable = is_finite(book.norm[k]), extreme = is_extreme(float_of(u32(*p.largest)));
    const double unit = double(power_of_two(-*book.exponent));
    double length2 = 0, error2 = 0;
    for (int d = int(lane_index()); d < book.columns; d += int(kWarp)) {
        u16 bits = 0;
        if (usable && !extreme && d < book.dim) {
            const double centred = double(book.words[k * book.stride + d]) - double(book.centre[d]);
            bits = half_of(float(centred / unit));
            const double left = centred - double(value_of_half(bits)) * unit;
            length2 += centred * centred, error2 += left * left;
        }
        book.halves[i64(k) * book.columns + d] = bits;
    }
    length2 = warp_sum(length2), error2 = warp_sum(error2);
    if (lane_index() != 0) return;
    book.half[k] = usable && !extreme ? float(length2 / 2) : infinity();
    book.length[k] = !usable ? 0 : extreme ? infinity() : float(sqrt(length2) * (1 + 0x1p-20)) + kTiny;
    book.error[k] = !usable ? 0 : extreme ? infinity() : float(sqrt(error2) * (1 + 0x1p-20)) + kTiny;
}
