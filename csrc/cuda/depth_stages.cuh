// What depth_decode's kernels do between products: what a product reads, where its sums go, attention, and what a drawn
// code makes of the next level.
#pragma once

#include "cuda/depth_sample.cuh"
#include "cuda/depth_stream.cuh"

namespace longcat::cuda {

// Of the whole grid.
struct GridBarrier {
    u32 meetings = 0;

    // Until all blocks have come; what they wrote before can be read then.
    LC_DEVICE void meet(const DepthKernel& p) {
        ++meetings;
        sync_block();
        if (thread_index() == 0) add_release(p.memory.arrived, 1), wait_for(p.memory.arrived, meetings * grid_size());
        sync_block();
    }
};

// An activation of a product before its norm: of row r, in column k.
LC_DEVICE float activation(const DepthKernel& p, int level, Product product, int r, int k) {
    const DepthMemory& m = p.memory;
    if (product == kProject) {
        if (!p.is_active(r)) return 0;
        if (level == 0 || p.conditioning == kLastAndHidden) return load(p.hidden_rows, p.type, i64(r) * p.hidden + k);
        return m.input[i64(r) * p.width + k];
    }
    if (product == kOut) return m.mixed[i64(r) * p.query_width() + k];
    if (product != kDown) return m.z[i64(r) * p.dim + k];
    const float up = m.up[i64(r) * p.ffn + k];
    if (!p.gated) return 0.5f * up * (1 + erff(up * 0.70710678f));
    const float gate = m.gate[i64(r) * p.ffn + k];
    return gate / (1 + expf(-gate)) * up;
}

LC_DEVICE int depth_of(const DepthKernel& p, Product product) {
    if (product == kProject) return p.hidden;
    return product == kOut ? p.query_width() : product == kDown ? p.ffn : p.dim;
}

// The weight of the norm before a product; null where there is none.
LC_DEVICE const void* norm_before(const DepthKernel& p, int level, int index, i64& first) {
    const Product product = product_of(p, index);
    first = 0;
    if (product == kProject) return p.input_norm;
    if (product == kQkv) return p.layer[(index - 1) / 4].norm1;
    if (product == kUp) return p.layer[(index - 1) / 4].norm2;
    if (product != kHead) return nullptr;
    first = p.level[level].norm_set * p.final_norm.set;
    return p.final_norm.data;
}

LC_DEVICE float bias_of(const DepthKernel& p, const DepthVector& bias, int set, int n) {
    return bias.data == nullptr ? 0 : load(bias.data, p.type, set * bias.set + n);
}

// What "last+hidden" adds to the projected state.
LC_DEVICE float added_input(const DepthKernel& p, int level, int r, int n) {
    if (p.conditioning != kLastAndHidden || !p.is_active(r)) return 0;
    if (level > 0) return p.memory.input[i64(r) * p.width + n];
    return p.start == nullptr ? 0 : load(p.start, p.type, i64(r) * p.dim + n);
}

LC_DEVICE void store_logit(const DepthKernel& p, int level, int n, int r, float sum) {
    const DepthLevel& at = p.level[level];
    if (at.head_bias != nullptr) sum += load(at.head_bias, p.type, n);
    p.memory.logits[i64(r) * p.most_classes + n] = sum;
    if (p.logits != nullptr) p.logits[r * p.logit_width + at.first_logit + n] = p.is_active(r) ? sum : 0;
}

// Where the sum of row n of a product's part goes.
LC_DEVICE void finish_product(const DepthKernel& p, int level, int index, int part, int n, int r, float sum) {
    const DepthMemory& to = p.memory;
    const DepthLevel& at = p.level[level];
    const DepthLayer& layer = p.layer[(index - 1) / 4 < p.layers ? (index - 1) / 4 : 0];
    const int queries = p.query_width(), keys = p.key_width();
    switch (product_of(p, index)) {
        case kProject:
            to.z[i64(r) * p.dim + n] =
                sum + bias_of(p, p.projection_bias, at.projection_set, n) + added_input(p, level, r, n);
            break;
        case kQkv:
            sum += bias_of(p, part == 0 ? layer.q_bias : part == 1 ? layer.k_bias : layer.v_bias, at.attention_set, n);
            to.qkv[i64(r) * (queries + 2 * keys) + (part == 0 ? 0 : queries + (part - 1) * keys) + n] = sum;
            break;
        case kOut:
            to.z[i64(r) * p.dim + n] += sum + bias_of(p, layer.out_bias, at.attention_set, n);
            break;
        case kUp:
            (part == 0 ? to.up : to.gate)[i64(r) * p.ffn + n] = sum;
            break;
        case kDown:
            to.z[i64(r) * p.dim + n] += sum;
            break;
        default:
            store_logit(p, level, n, r, sum);
    }
}

// A head's query or key: its channels as the product gave them, their norm and turn applied on the way.
struct HeadVector {
    const float *raw, *rope;  // the latter: cosines of this level's angles; null: no turn
    const void* weight;       // null: no norm
    i64 sines;                // how far behind the cosines they are
    float scale;
    int type, channels;

    LC_DEVICE HeadVector(const DepthKernel& p, const float* raw_, const void* weight_, int level)
        : raw(raw_),
          rope(p.rope == nullptr ? nullptr : p.rope + level * (p.head_dim / 2)),
          weight(weight_),
          sines(i64(p.levels) * (p.head_dim / 2)),
          scale(1),
          type(p.type),
          channels(p.head_dim) {
        if (weight == nullptr) return;
        float squares = 0;
        for (int c = int(lane_index()); c < channels; c += int(kWarp)) squares = fmaf(raw[c], raw[c], squares);
        scale = 1 / sqrtf(warp_sum(squares) / float(channels) + p.eps);
    }

    LC_DEVICE float normed(int c) const { return weight == nullptr ? raw[c] : raw[c] * scale * load(weight, type, c); }

    LC_DEVICE float operator()(int c) const {
        const int half = channels / 2, angle = c < half ? c : c - half;
        if (rope == nullptr) return normed(c);
        const float cosine = rope[angle], sine = rope[sines + angle];
        return c < half ? normed(c) * cosine - normed(c + half) * sine : normed(c) * cosine + normed(c - half) * sine;
    }
};

// Attention of one row and head over the levels so far, by a warp; the first head of a group keeps key and value.
LC_DEVICE void attend_head(const DepthKernel& p, int level, int layer, int row, int head) {
    constexpr int kEach = kDepthHead / int(kWarp);
    const int channels = p.head_dim, queries = p.query_width(), keys = p.key_width();
    const int group = p.heads / p.kv_heads, kv = head / group;
    const float* qkv = p.memory.qkv + i64(row) * (queries + 2 * keys);
    const HeadVector query(p, qkv + head * channels, p.layer[layer].q_norm, level);
    const HeadVector key(p, qkv + queries + kv * channels, p.layer[layer].k_norm, level);
    const i64 cache = (i64(layer) * p.rows + row) * p.levels * keys + kv * channels;
    float q[kEach], k[kEach], sums[kEach], score = -infinity();
    LC_UNROLL for (int i = 0; i < kEach; ++i) {
        const int c = i * int(kWarp) + int(lane_index());
        q[i] = c < channels ? query(c) : 0, k[i] = c < channels ? key(c) : 0, sums[i] = 0;
        if (c >= channels || head % group != 0) continue;
        p.memory.keys[cache + i64(level) * keys + c] = k[i];
        p.memory.values[cache + i64(level) * keys + c] = qkv[queries + keys + kv * channels + c];
    }
    LC_LOOP for (int past = 0; past <= level; ++past) {
        float product = 0;
        LC_UNROLL for (int i = 0; i < kEach; ++i) {
            const int c = i * int(kWarp) + int(lane_index());
            if (c < channels)
                product = fmaf(q[i], past == level ? k[i] : p.memory.keys[cache + i64(past) * keys + c], product);
        }
        product = warp_sum(product);
        if (int(lane_index()) == past) score = product / sqrtf(float(channels));
    }
    const float weight = expf(score - warp_max(score)), total = warp_sum(weight);
    LC_LOOP for (int past = 0; past <= level; ++past) {
        const float share = float_of(shuffle_from(bits_of(weight), u32(past))) / total;
        LC_UNROLL for (int i = 0; i < kEach; ++i) {
            const int c = i * int(kWarp) + int(lane_index());
            if (c >= channels) continue;
            const float value =
                past == level ? qkv[queries + keys + kv * channels + c] : p.memory.values[cache + i64(past) * keys + c];
            sums[i] = fmaf(share, value, sums[i]);
        }
    }
    LC_UNROLL for (int i = 0; i < kEach; ++i) {
        const int c = i * int(kWarp) + int(lane_index());
        if (c < channels) p.memory.mixed[i64(row) * queries + head * channels + c] = sums[i];
    }
}

// Attention of all rows and heads, each by a warp.
LC_DEVICE void attend(const DepthKernel& p, int level, int layer) {
    LC_LOOP for (int i = first_tile(); i < p.rows * p.heads; i += tile_stride())
        attend_head(p, level, layer, i / p.heads, i % p.heads);
}

// Adds a code's embedding to the row's sum; after the last level the sum is the result.
LC_DEVICE void add_embedding(const DepthKernel& p, int row, int level, int id) {
    const DepthLevel& at = p.level[level];
    const bool had_ended = level == 0 ? p.ends != 0 : p.memory.ended[row] != 0;
    const bool ended = had_ended && (at.table == nullptr || id == at.classes - 1);
    const i64 first = i64(row) * p.width;
    for (int e = int(thread_index()); e < p.width; e += int(kDepthThreads)) {
        const float word = at.table == nullptr ? 0 : load(at.table, p.type, id * at.table_row + e);
        const float before = level == 0 ? 0 : p.memory.total[first + e], total = before + word;
        p.memory.total[first + e] = total;
        p.memory.input[first + e] = p.conditioning != kSum ? word : ended ? 0 : total;
        if (level == p.levels - 1) store(p.embedding, p.type, first + e, ended ? 0 : total);
    }
    sync_block();  // all have read what is written now
    if (thread_index() == 0) p.memory.ended[row] = ended;
}

LC_DEVICE void leave_row(const DepthKernel& p, int row) {
    for (int e = int(thread_index()); e < p.width; e += int(kDepthThreads))
        store(p.embedding, p.type, i64(row) * p.width + e, 0);
}

// The code of a row that leads, for it and for its follower.
LC_DEVICE void finish_row(const DepthKernel& p, DepthShared& shared, int level, int leader) {
    const i64 classes = p.level[level].classes;
    int follower = -1;
    for (int r = 0; r < p.rows; ++r)
        if (r != leader && p.leader(r) == leader) follower = r;
    const bool active = p.is_active(leader);
    Drawn drawn = {-1, 0, 0};
    if (active) {
        i64 forced = level < p.prefix_width ? p.prefix[leader * p.prefix_row + level] : -1;
        forced = forced < classes ? forced : classes - 1;  // on a device nobody has checked it
        if (level >= p.given)
            drawn = draw(p, leader, follower, level, forced, shared);
        else
            drawn.id = int(forced > 0 ? forced : 0);
    }
    LC_LOOP for (int turn = 0; turn < 2; ++turn) {
        const int row = turn == 0 ? leader : follower;
        if (row < 0) continue;
        if (thread_index() == 0) {
            const i64 place = i64(row) * p.levels + level;
            p.codes[place] = drawn.id, p.logprobs[place] = drawn.logprob, p.drawn_logprobs[place] = drawn.drawn_logprob;
        }
        if (active)
            add_embedding(p, row, level, drawn.id);
        else if (level == p.levels - 1)
            leave_row(p, row);
    }
}

// The codes of a level, a block a row.
LC_DEVICE void draw_level(const DepthKernel& p, DepthShared& shared, int level) {
    LC_LOOP for (int row = int(block_index()); row < p.rows; row += int(grid_size())) if (p.leader(row) == row)
        finish_row(p, shared, level, row);
}

}  // namespace longcat::cuda
