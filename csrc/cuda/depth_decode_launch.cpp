#include "cuda/depth_decode_launch.h"

#include <algorithm>

namespace longcat::cuda {
namespace {

constexpr size_t kHeaderNumbers = 12, kFirstTensors = 5, kLayerTensors = 15;

// Shared memory that one block may have (CUDA C++ Programming Guide, technical specifications by compute capability).
int shared_bytes_of(const Device& device) {
    const bool small = device.major == 12 || (device.major == 8 && (device.minor == 6 || device.minor == 9));
    return (small ? 99 : device.major == 8 ? 163 : 227) * 1024;
}

int rounded_to_step(int64_t depth) { return int((depth + kStep - 1) / kStep * kStep); }

// The config's numbers as `DepthConfig.numbers` writes them.
struct Numbers {
    const std::vector<int64_t>& all;
    int64_t levels;

    explicit Numbers(const std::vector<int64_t>& config) : all(config), levels(config.at(0)) {
        LC_CHECK(levels >= 0 && all.size() == kHeaderNumbers + 5 * size_t(levels),
                 "depth_decode: config must have 12 numbers, and 5 a level");
    }
    int64_t deepest() const { return std::max({all[1], all[2], all[4] * all[6], all[7]}); }
    const int64_t* per_level(size_t which) const { return all.data() + kHeaderNumbers + which * size_t(levels); }
};

DepthMatrix matrix(const DepthTensor& t) { return {t.data, t.strides[0], t.strides[1]}; }
DepthVector vector(const DepthTensor& t) { return {t.data, t.strides[0]}; }

DepthLayer layer_of(const DepthTensor* t) {
    DepthLayer layer = {};
    layer.norm1 = t[0].data, layer.q = matrix(t[1]), layer.q_bias = vector(t[2]), layer.k = matrix(t[3]);
    layer.k_bias = vector(t[4]), layer.v = matrix(t[5]), layer.v_bias = vector(t[6]), layer.out = matrix(t[7]);
    layer.out_bias = vector(t[8]), layer.q_norm = t[9].data, layer.k_norm = t[10].data, layer.norm2 = t[11].data;
    layer.gate = matrix(t[12]), layer.up = matrix(t[13]), layer.down = matrix(t[14]);
    return layer;
}

void add_levels(DepthKernel& p, const Numbers& numbers, const DepthTensor* tensors) {
    i64 first_logit = 0;
    for (int64_t l = 0; l < numbers.levels; ++l) {
        DepthLevel& level = p.level[l];
        const DepthTensor *table = tensors + l, *head = table + numbers.levels, *bias = head + numbers.levels;
        level.classes = int(numbers.per_level(0)[l]);
        level.attention_set = u8(numbers.per_level(1)[l]), level.ffn_set = u8(numbers.per_level(2)[l]);
        level.projection_set = u8(numbers.per_level(3)[l]), level.norm_set = u8(numbers.per_level(4)[l]);
        level.table = table->data, level.table_row = table->strides[0];
        level.head = l < p.given ? nullptr : head->data, level.head_row = head->strides[0],
        level.head_bias = bias->data;
        level.first_logit = first_logit;
        first_logit += l < p.given ? 0 : level.classes;
        p.most_classes = std::max(p.most_classes, level.classes);
    }
    p.logit_width = first_logit;
}

DepthMemory take_memory(Arena& arena, const DepthKernel& p) {
    const int64_t rows = p.rows, cache = rows * p.layers * p.levels * p.key_width();
    DepthMemory m = {};
    m.arrived = arena.take<u32>(1);
    m.z = arena.take<float>(rows * p.dim), m.mixed = arena.take<float>(rows * p.query_width());
    m.qkv = arena.take<float>(rows * (p.query_width() + 2 * p.key_width()));
    m.gate = arena.take<float>(rows * p.ffn), m.up = arena.take<float>(rows * p.ffn);
    m.logits = arena.take<float>(rows * p.most_classes), m.scores = arena.take<float>(rows * p.most_classes);
    m.keys = arena.take<float>(cache), m.values = arena.take<float>(cache);
    m.total = arena.take<float>(rows * p.width), m.input = arena.take<float>(rows * p.width);
    m.ended = arena.take<int>(rows);
    return m;
}

// What a block of the kernel for few rows has beside its rings.
int64_t few_fixed_bytes(int64_t rows, int64_t columns) {
    return kDepthHeader + padded_rows(int(rows)) * columns * int64_t(sizeof(float));
}

// How many rows the kernel for few rows takes.
int64_t few_rows(const Device& device, int64_t columns) {
    int64_t rows = kDepthRows;
    while (rows > 0 && few_fixed_bytes(rows, columns) + kFewestSlots * kRingBytes > shared_bytes_of(device)) --rows;
    return rows;
}

int64_t most_rows(const Device& device, int64_t columns, int type) {
    const bool many = type == kBFloat16 && kMmaFixedBytes + kMostStrips * kRingBytes <= shared_bytes_of(device);
    return many ? kMmaRows : few_rows(device, columns);
}

}  // namespace

DepthKernel depth_kernel(const std::vector<int64_t>& config, float eps, const std::vector<DepthTensor>& weights) {
    const Numbers numbers(config);
    DepthKernel p = {};
    const int64_t layers = config[3];
    LC_CHECK(numbers.levels >= 1 && numbers.levels <= kDepthLevels && layers >= 0 && layers <= kDepthLayers,
             "depth_decode: there must be 1 to 32 levels and at most 16 layers");
    const size_t first = kFirstTensors + kLayerTensors * size_t(layers);
    LC_CHECK(weights.size() == first + 3 * size_t(numbers.levels),
             "depth_decode: weights must have the tensors that config says");
    p.levels = int(numbers.levels), p.hidden = int(config[1]), p.dim = int(config[2]), p.layers = int(config[3]);
    p.heads = int(config[4]), p.kv_heads = int(config[5]), p.head_dim = int(config[6]), p.ffn = int(config[7]);
    p.given = int(config[8]), p.conditioning = int(config[9]), p.ends = int(config[10]), p.gated = int(config[11]);
    p.width = p.conditioning == kLastAndHidden ? p.dim : p.hidden, p.eps = eps;
    p.columns = rounded_to_step(numbers.deepest());
    p.input_norm = weights[0].data, p.projection = matrix(weights[1]), p.projection_bias = vector(weights[2]);
    p.final_norm = vector(weights[3]), p.rope = static_cast<const float*>(weights[4].data);
    for (int64_t i = 0; i < layers; ++i) p.layer[i] = layer_of(&weights[kFirstTensors + kLayerTensors * size_t(i)]);
    add_levels(p, numbers, &weights[first]);
    return p;
}

int64_t depth_most_rows(const Device& device, const std::vector<int64_t>& config, int type) {
    const Numbers numbers(config);
    if (config[3] > kDepthLayers || config[6] > kDepthHead || numbers.levels > kDepthLevels) return 0;
    return most_rows(device, rounded_to_step(numbers.deepest()), type);
}

int64_t depth_decode(Queue& queue, DepthKernel p, void* workspace) {
    const Device device = queue.device();
    const bool many = p.rows > few_rows(device, p.columns);
    LC_CHECK(p.rows <= most_rows(device, p.columns, p.type),
             "depth_decode: the kernel takes fewer rows of these sizes and this dtype");
    Arena arena(workspace);
    p.memory = take_memory(arena, p);
    if (many) p.memory.elements = arena.take<u16>((p.rows + 7) / 8 * 8 * int64_t(p.columns));
    if (workspace == nullptr || p.rows == 0) return arena.used();
    LC_CHECK(!many || device.multiprocessors * kGroupRows >= p.rows,
             "depth_decode: the device must have a multiprocessor for each 32 rows");
    const int64_t fixed = many ? kMmaFixedBytes : few_fixed_bytes(p.rows, p.columns);
    p.slots = int(std::min<int64_t>((shared_bytes_of(device) - fixed) / kRingBytes, kMostSlots));
    queue.zero(p.memory.arrived, sizeof *p.memory.arrived);
    Launch launch = {many ? "depth_decode_mma" : "depth_decode", unsigned(device.multiprocessors), 1, kDepthThreads};
    launch.shared_bytes = unsigned(shared_bytes_of(device)), launch.cooperative = true;  // what one block may have
    queue.run(launch, p);
    return arena.used();
}

}  // namespace longcat::cuda
