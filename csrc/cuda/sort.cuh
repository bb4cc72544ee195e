// Stable sorting of row numbers by radix, eight bits a pass: where a row goes depends only on the rows, never on
// timing.
//
// A pass is three launches: sort_count, sort_scan, sort_scatter. A block has 2048 rows, each of its eight warps 256 of
// them in turn: 32 at a time, ranked among themselves by ballots.
#pragma once

#include "cuda/device.cuh"
#include "cuda/sort_params.cuh"

namespace longcat::cuda {

constexpr u32 kSortWarps = kSortThreads / kWarp, kSortWarpRows = kSortRows / kSortWarps;
constexpr u32 kNoDigit = kSortDigits;

// As reference/ema_update.py.
LC_DEVICE u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// What rows are sorted by: their codes, those out of range last; or the mixed number.
LC_DEVICE u32 sort_key(const SortPass& p, i64 row) {
    if (p.codes == nullptr) return mix(mix(u32(row)) ^ p.key);
    const i64 code = p.codes[row * p.stride];
    return code >= 0 && code < p.entries ? u32(code) : u32(p.entries);
}

LC_DEVICE i64 sort_rows_left(const SortPass& p) { return p.left == nullptr ? p.rows : *p.left; }

LC_DEVICE int sorted_row(const SortPass& p, i64 place) { return p.from == nullptr ? int(place) : p.from[place]; }

// The digit of the row at `place`, and the lanes whose row has the same one.
struct Digit {
    u32 digit, peers;

    LC_DEVICE Digit(const SortPass& p, i64 place, i64 end) {
        digit = place < end ? sort_key(p, sorted_row(p, place)) >> p.shift & (kSortDigits - 1) : kNoDigit;
        peers = kAllLanes;
        LC_UNROLL for (u32 bit = 0; bit < 9; ++bit) {
            const u32 votes = ballot(digit >> bit & 1);
            peers &= digit >> bit & 1 ? votes : ~votes;
        }
    }

    LC_DEVICE u32 rank() const { return count_bits(peers & ((1u << lane_index()) - 1)); }
    LC_DEVICE bool leads() const { return digit != kNoDigit && rank() == 0; }
};

// How many of a warp's rows have each digit; `counts` is shared, one row of digits a warp.
LC_DEVICE void count_digits(const SortPass& p, u32 (&counts)[kSortWarps][kSortDigits], i64 end) {
    const u32 warp = thread_index() / kWarp;
    for (u32 digit = lane_index(); digit < kSortDigits; digit += kWarp) counts[warp][digit] = 0;
    const i64 first = i64(block_index()) * kSortRows + warp * kSortWarpRows;
    for (u32 i = 0; i < kSortWarpRows; i += kWarp) {
        const Digit digit(p, first + i + lane_index(), end);
        sync_warp();  // another lane may have counted this digit before
        if (digit.leads()) counts[warp][digit.digit] += count_bits(digit.peers);
    }
}

}  // namespace longcat::cuda

LC_KERNEL(longcat::cuda::kSortThreads) sort_count(LC_PARAMS(longcat::cuda::SortPass) p) {
    using namespace longcat::cuda;
    LC_SHARED u32 counts[kSortWarps][kSortDigits];
    const i64 end = sort_rows_left(p);
    if (end == 0) return;
    count_digits(p, counts, end);
    sync_block();
    u32 total = 0;
    for (u32 warp = 0; warp < kSortWarps; ++warp) total += counts[warp][thread_index()];
    p.places[i64(thread_index()) * p.blocks + block_index()] = total;
}

// Counts, digit by digit and block by block, into first places; one block, a thread a digit.
LC_KERNEL(longcat::cuda::kSortThreads) sort_scan(LC_PARAMS(longcat::cuda::SortPass) p) {
    using namespace longcat::cuda;
    LC_SHARED u32 sums[kSortDigits];
    if (sort_rows_left(p) == 0) return;
    u32* mine = p.places + i64(thread_index()) * p.blocks;
    u32 sum = 0;
    for (int block = 0; block < p.blocks; ++block) sum += mine[block];
    sums[thread_index()] = sum;
    sync_block();
    u32 place = 0;
    for (u32 digit = 0; digit < thread_index(); ++digit) place += sums[digit];
    for (int block = 0; block < p.blocks; ++block) {
        const u32 count = mine[block];
        mine[block] = place;
        place += count;
    }
}

LC_KERNEL(longcat::cuda::kSortThreads) sort_scatter(LC_PARAMS(longcat::cuda::SortPass) p) {
    using namespace longcat::cuda;
    LC_SHARED u32 places[kSortWarps][kSortDigits];
    const i64 end = sort_rows_left(p);
    if (end == 0) return;
    count_digits(p, places, end);
    sync_block();
    u32 place = p.places[i64(thread_index()) * p.blocks + block_index()];
    for (u32 warp = 0; warp < kSortWarps; ++warp) {
        const u32 count = places[warp][thread_index()];
        places[warp][thread_index()] = place;
        place += count;
    }
    sync_block();
    const u32 warp = thread_index() / kWarp;
    const i64 first = i64(block_index()) * kSortRows + warp * kSortWarpRows;
    for (u32 i = 0; i < kSortWarpRows; i += kWarp) {
        const i64 from = first + i + lane_index();
        const Digit digit(p, from, end);
        u32 to = 0;
        if (digit.digit != kNoDigit) to = places[warp][digit.digit] + digit.rank();
        sync_warp();  // all have read the place that the leader moves on
        if (digit.leads()) places[warp][digit.digit] += count_bits(digit.peers);
        sync_warp();
        if (digit.digit != kNoDigit) p.to[to] = sorted_row(p, from);
    }
}
