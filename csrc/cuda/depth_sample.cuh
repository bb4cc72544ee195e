// One draw of depth_decode by a block, as reference/sampling.py defines it, without sorting.
//
// What top_k, top_p and min_p keep is each a front part of the ids in falling order of their scores, equal ones by
// rising id. So what is kept is a least score and, among those equal to it, a last id; a radix search over the bits of
// the scores finds both: four counts of eight bits, in integers, hence in any order. Masses are counted in units of
// 2^-40 of the largest one's, which is among them.
#pragma once

#include "cuda/depth_params.cuh"
#include "cuda/reduce.cuh"

namespace longcat::cuda {

struct DrawNumbers {
    float temperature;
    int top_k;
    float top_p, min_p, penalty;
    int excluded;
    float guidance;
    bool joint;

    LC_DEVICE DrawNumbers(const float* p, int classes)
        : temperature(p[0]),
          top_k(int(p[1])),
          top_p(p[2]),
          min_p(p[3]),
          penalty(p[4]),
          excluded(int(p[5])),
          guidance(p[6]),
          joint(p[7] > 0) {
        if (excluded < 0 || excluded >= classes) excluded = 0;  // on a device nobody has checked it
    }
};

struct Drawn {
    int id;
    float logprob, drawn_logprob;
};

// Bits whose order as integers is that of the numbers.
LC_DEVICE u32 ordered_bits(float value) {
    const u32 bits = bits_of(value + 0.0f);  // -0 and 0 are equal
    return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

LC_DEVICE float value_of_key(u32 key) { return float_of(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu)); }

// Word `id % 4` of Philox-4x32-10 (Salmon et al. 2011).
LC_DEVICE u32 philox_word(u64 seed, u64 step, u32 level, u32 id) {
    u32 key0 = u32(seed), key1 = u32(seed >> 32);
    u32 c0 = id / 4, c1 = level, c2 = u32(step), c3 = u32(step >> 32);
    LC_LOOP for (int round = 0; round < 10; ++round) {
        const u64 low = u64(c0) * 0xD2511F53u, high = u64(c2) * 0xCD9E8D57u;
        const u32 next0 = u32(high >> 32) ^ c1 ^ key0, next2 = u32(low >> 32) ^ c3 ^ key1;
        c1 = u32(high), c3 = u32(low), c0 = next0, c2 = next2;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return id % 4 == 0 ? c0 : id % 4 == 1 ? c1 : id % 4 == 2 ? c2 : c3;
}

LC_DEVICE double gumbel(u32 word) { return -log(-log1p(-(double(word) + 0.5) * 0x1p-32)); }

// Within 2^-19 of `gumbel`, relative to 1 + |gumbel|: near 1 by the distance from 1, so that nothing cancels.
LC_DEVICE float near_gumbel(u32 word) {
    const float above = (float(~word) + 0.5f) * 0x1p-32f, below = (float(word) + 0.5f) * 0x1p-32f;
    return -logf(word >> 31 != 0 ? -logf(above) : -log1pf(-below));
}

// The largest of (value, then the lowest id) over the block, in every thread.
LC_DEVICE void block_argmax(double& value, u32& id, DepthShared& s) {
    for (u32 mask = kWarp / 2; mask > 0; mask /= 2) {
        const double other = shuffle_xor(value, mask);
        const u32 other_id = shuffle_xor(id, mask);
        if (other > value || (other == value && other_id < id)) value = other, id = other_id;
    }
    if (lane_index() == 0) s.doubles[thread_index() / kWarp] = value, s.ids[thread_index() / kWarp] = id;
    sync_block();
    value = s.doubles[0], id = s.ids[0];
    for (u32 warp = 1; warp < kDepthWarps; ++warp)
        if (s.doubles[warp] > value || (s.doubles[warp] == value && s.ids[warp] < id))
            value = s.doubles[warp], id = s.ids[warp];
    sync_block();
}

// Which ids are kept: those above `key`, and those equal to it up to `last_id`.
struct Kept {
    u32 key, last_id;

    LC_DEVICE bool has(u32 found, int id) const { return found > key || (found == key && u32(id) <= last_id); }
};

// The scores of a row, at a temperature: what the searches count.
struct Scores {
    const float* of;
    int classes;
    float largest, temperature;

    LC_DEVICE u32 key(int id) const { return ordered_bits(of[id]); }
    LC_DEVICE float relative(int id) const { return (of[id] - largest) / temperature; }
    LC_DEVICE double exact_relative(int id) const { return (double(of[id]) - double(largest)) / double(temperature); }
    LC_DEVICE u64 mass_of(float score) const {
        return u64(double(expf((score - largest) / temperature)) * 0x1p40 + 0.5);
    }
    LC_DEVICE u64 mass(int id) const { return mass_of(of[id]); }
};

LC_DEVICE u64 shuffle_from(u64 value, u32 lane) {
    return u64(cuda::shuffle_from(u32(value >> 32), lane)) << 32 | cuda::shuffle_from(u32(value), lane);
}

// The last bin, from the highest down, that is not empty and has less than `target` before it; by one warp.
LC_DEVICE void find_bin(DepthShared& s, u64 before, u64 target) {
    const int first = 255 - 8 * int(lane_index());
    u64 own = 0;
    for (int i = 0; i < 8; ++i) own += s.bins[first - i];
    u64 sum = own;  // of this lane's bins and those above
    for (u32 distance = 1; distance < kWarp; distance *= 2) {
        const u64 other = shuffle_from(sum, (lane_index() - distance) % kWarp);
        sum += lane_index() >= distance ? other : 0;
    }
    u64 at = before + sum - own;
    const u32 votes = ballot(own != 0 && at < target);
    if (votes == 0 || lane_index() != kWarp - 1 - leading_zeros(votes)) return;
    for (int i = 0; i < 8 && at < target; at += s.bins[first - i++])
        if (s.bins[first - i] != 0) s.found[0] = u64(first - i), s.found[1] = at;
}

// A search: in falling order of keys, for the last id that has less than `target` before it in weight.
struct Search {
    bool by_id;    // keys are ids, the lowest first, of those with score `score`; else scores
    bool by_mass;  // weights are masses; else one each
    u32 score;
    Kept among;  // others have no weight
    u64 target;  // no more than all weights together
};

LC_DEVICE u64 weight_of(const Scores& scores, const Search& q, u32 key, int id) {
    if (!q.among.has(key, id) || (q.by_id && key != q.score)) return 0;
    return q.by_mass ? scores.mass(id) : 1;
}

// The key found; `room`: what is left of the target before its ids.
LC_DEVICE u32 search(const Scores& scores, const Search& q, u64& room, DepthShared& s) {
    u32 found = 0;
    u64 before = 0;
    LC_LOOP for (int shift = 24; shift >= 0; shift -= 8) {
        if (thread_index() < 256) s.bins[thread_index()] = 0;
        sync_block();
        LC_LOOP for (int id = int(thread_index()); id < scores.classes; id += int(kDepthThreads)) {
            const u32 score = scores.key(id), key = q.by_id ? ~u32(id) : score;
            if (shift < 24 && key >> (shift + 8) != found >> (shift + 8)) continue;
            const u64 weight = weight_of(scores, q, score, id);
            if (weight != 0) atomic_add(&s.bins[key >> shift & 255], weight);
        }
        sync_block();
        if (thread_index() < kWarp) find_bin(s, before, q.target);
        sync_block();
        found |= u32(s.found[0]) << shift, before = s.found[1];
    }
    room = q.target - before;
    return found;
}

LC_DEVICE u64 block_total(u64 value, DepthShared& s) {
    if (thread_index() == 0) s.bins[0] = 0;
    sync_block();
    if (value != 0) atomic_add(&s.bins[0], value);
    sync_block();
    value = s.bins[0];
    sync_block();
    return value;
}

// The mass of which less must be before an id that top_p keeps; false if it keeps all that is kept.
LC_DEVICE bool limits_mass(const Scores& scores, const DrawNumbers& n, const Kept& kept, DepthShared& s, u64& target) {
    if (n.top_p >= 1) return false;
    u64 first = 0, all = 0;
    LC_LOOP for (int id = int(thread_index()); id < scores.classes; id += int(kDepthThreads)) {
        const u64 mass = scores.mass(id);
        all += mass, first += kept.has(scores.key(id), id) ? mass : 0;
    }
    all = block_total(all, s), first = block_total(first, s);
    target = u64(ceil(double(n.top_p) * double(n.joint ? all : first)));
    return target < first;
}

// What top_k and top_p leave: of each, first the least score, then the last id that has it. Equal scores have equal
// masses.
LC_DEVICE Kept truncate(const Scores& scores, const DrawNumbers& n, DepthShared& s) {
    Kept kept = {0, 0xffffffffu};
    Search q = {};
    LC_LOOP for (int turn = 0; turn < 4; ++turn) {
        if (turn % 2 == 0) {
            q = {false, turn == 2, 0, kept, u64(n.top_k)};
            const bool limited =
                turn == 0 ? n.top_k > 0 && n.top_k < scores.classes : limits_mass(scores, n, kept, s, q.target);
            if (!limited) {
                ++turn;
                continue;
            }
        }
        u64 room = 0;
        const u32 found = search(scores, q, room, s);
        if (turn % 2 == 0) {
            const u64 each = q.by_mass ? scores.mass_of(value_of_key(found)) : 1;
            q = {true, false, found, kept, (room + each - 1) / each};
        } else {
            kept = {q.score, ~found};
        }
    }
    return kept;
}

// Whether an id can be drawn, min_p considered.
LC_DEVICE bool keeps(const Scores& scores, const DrawNumbers& n, const Kept& kept, int id) {
    if (!kept.has(scores.key(id), id)) return false;
    return n.min_p <= 0 || exp(scores.exact_relative(id)) >= double(n.min_p);
}

// By how much a score seen in float32, relative to the largest, may be off: (y - m) / T by 2^-22 of itself, the noise
// as `near_gumbel` says; the rest is to spare.
LC_DEVICE double slack(float relative, float noise) {
    return double(fabsf(relative)) * 0x1p-21 + double(1 + fabsf(noise)) * 0x1p-19;
}

// The id of the largest y / T + g among those kept. A first look in float32 leaves those that may be the largest in
// float64, whose own rounding is less than 2^-50 |m| / T.
LC_DEVICE int draw_id(const Scores& scores, const DrawNumbers& n, const Kept& kept, u64 seed, u64 step, u32 level,
                      DepthShared& s) {
    double least = -double_infinity();  // that the winner has
    u32 ignored = 0;
    LC_LOOP for (int id = int(thread_index()); id < scores.classes; id += int(kDepthThreads)) {
        if (!keeps(scores, n, kept, id)) continue;
        const float relative = scores.relative(id), noise = near_gumbel(philox_word(seed, step, level, u32(id)));
        const double low = double(relative) + double(noise) - slack(relative, noise);
        least = low > least ? low : least;
    }
    block_argmax(least, ignored, s);
    const double temperature = double(n.temperature), rounding = fabs(double(scores.largest)) / temperature * 0x1p-50;
    double best = -double_infinity();
    u32 winner = 0xffffffffu;
    LC_LOOP for (int id = int(thread_index()); id < scores.classes; id += int(kDepthThreads)) {
        if (!keeps(scores, n, kept, id)) continue;
        const u32 word = philox_word(seed, step, level, u32(id));
        const float relative = scores.relative(id), noise = near_gumbel(word);
        if (double(relative) + double(noise) + slack(relative, noise) < least - rounding) continue;
        const double score = double(scores.of[id]) / temperature + gumbel(word);
        if (score > best || winner == 0xffffffffu) best = score, winner = u32(id);
    }
    block_argmax(best, winner, s);
    return winner < u32(scores.classes) ? int(winner) : 0;
}

// A row's logits after guidance: its own, and those of its follower or null.
struct GuidedLogits {
    const float *own, *other;
    float scale;

    LC_DEVICE float operator()(int id) const {
        return other == nullptr ? own[id] : scale * (own[id] - other[id]) + other[id];
    }
};

// Writes scores: logits after the repetition penalty, -inf for what is not drawn. Gives log sum exp of the logits, NaN
// where it is not finite.
LC_DEVICE double write_scores(const DepthKernel& p, const GuidedLogits& logits, float* scores, int row, int level,
                              const DrawNumbers& n, DepthShared& s) {
    const int classes = p.level[level].classes, drawable = classes - n.excluded;
    float largest = -infinity();
    u64 wrong = 0;
    LC_LOOP for (int id = int(thread_index()); id < classes; id += int(kDepthThreads)) {
        const float value = logits(id);
        wrong += value <= largest_float() ? 0 : 1;  // NaN or infinity
        largest = fmaxf(largest, value);
        scores[id] = id < drawable ? value : -infinity();
    }
    largest = block_max<kDepthThreads>(largest, s.floats[0]);
    wrong = block_total(wrong, s);
    if (p.history != nullptr && n.penalty != 1) {
        const i64 end = p.offsets[row + 1] < p.history_rows ? p.offsets[row + 1] : p.history_rows;
        for (i64 i = (p.offsets[row] > 0 ? p.offsets[row] : 0) + thread_index(); i < end; i += kDepthThreads) {
            const i64 id = p.history[i * p.levels + level];
            if (id < 0 || id >= drawable) continue;
            const float value = logits(int(id));
            scores[id] = value < 0 ? value * n.penalty : value / n.penalty;
        }
    }
    double sum = 0;
    LC_LOOP for (int id = int(thread_index()); id < classes; id += int(kDepthThreads)) sum +=
        double(expf(logits(id) - largest));
    sum = block_sum<kDepthThreads>(sum, s.doubles);  // its barriers also end the writing of scores
    return wrong != 0 || largest == -infinity() ? double(not_a_number()) : double(largest) + log(sum);
}

// Draws the code of a row that leads, at a level that has a head; all threads get it.
LC_DEVICE Drawn draw(const DepthKernel& p, int row, int follower, int level, i64 forced, DepthShared& s) {
    const int classes = p.level[level].classes;
    const DrawNumbers n(p.params + row * p.params_row + level * p.params_level, classes);
    const float* all = p.memory.logits;
    float* scores_of = p.memory.scores + i64(row) * p.most_classes;
    const float* other = follower < 0 ? nullptr : all + i64(follower) * p.most_classes;
    const GuidedLogits logits = {all + i64(row) * p.most_classes, other, n.guidance};
    const double lse = write_scores(p, logits, scores_of, row, level, n, s);
    if (lse != lse) return {forced < 0 ? 0 : int(forced), not_a_number(), not_a_number()};
    double largest = -double_infinity();
    u32 greedy = 0xffffffffu;
    LC_LOOP for (int id = int(thread_index()); id < classes;
                 id += int(kDepthThreads)) if (double(scores_of[id]) > largest || greedy == 0xffffffffu)
        largest = double(scores_of[id]),
        greedy = u32(id);
    block_argmax(largest, greedy, s);
    if (n.temperature <= 0) {
        const int id = forced < 0 ? int(greedy) : int(forced);
        return {id, float(double(logits(id)) - lse), id == int(greedy) ? 0.0f : -infinity()};
    }
    if (largest == -double_infinity()) {  // no id is left
        const int id = forced < 0 ? 0 : int(forced);
        return {id, float(double(logits(id)) - lse), -infinity()};
    }
    const Scores scores = {scores_of, classes, float(largest), n.temperature};
    const Kept kept = truncate(scores, n, s);
    const u64 seed = u64(p.seeds[row]), step = u64(p.steps[row * p.step_stride]);
    const int id = forced < 0 ? draw_id(scores, n, kept, seed, step, u32(level), s) : int(forced);
    double sum = 0;
    LC_LOOP for (int i = int(thread_index()); i < classes; i += int(kDepthThreads)) if (keeps(scores, n, kept, i))
        sum += double(expf(scores.relative(i)));
    sum = block_sum<kDepthThreads>(sum, s.doubles);
    const bool is_kept = keeps(scores, n, kept, id);
    return {id, float(double(logits(id)) - lse), is_kept ? float(scores.exact_relative(id) - log(sum)) : -infinity()};
}

}  // namespace longcat::cuda
