#include "depth_model.h"

#include <cstring>

#include "large_pages.h"
#include "longcat/check.h"

namespace longcat {
namespace {

constexpr int64_t kLine = 64, kMagic = 0x64657074685f3031;

struct Header {
    int64_t magic, bytes, isa, format, items, shape;
};

// Where a matrix comes from.
struct Source {
    const Strided &weight, &bias;
    int64_t set, columns, depth;
    const Strided* gate = nullptr;  // of a gated one
};

// Calls `visit` with each vector and matrix of a model, its place in it and where it comes from, in the order in which
// a level reads them.
template <class Visit>
void walk(DepthModel& model, const DepthShape& s, const DepthWeights& w, Visit& visit) {
    const Strided none;
    const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
    visit.vector(model.input_norm, w.input_norm, 0, s.hidden);
    visit.vector(model.rope, w.rope, 0, s.levels * s.head_dim);
    const int64_t norms = set_count(s.norm_sets, s.levels), projections = set_count(s.projection_sets, s.levels);
    model.final_norm.resize(size_t(norms)), model.projection.resize(size_t(projections));
    for (int64_t i = 0; i < norms; ++i) visit.vector(model.final_norm[size_t(i)], w.final_norm, i, s.dim);
    for (int64_t i = 0; i < projections; ++i)
        visit.matrix(model.projection[size_t(i)], {w.projection, w.projection_bias, i, s.dim, s.hidden});
    const int64_t attentions = set_count(s.attention_sets, s.levels), ffns = set_count(s.ffn_sets, s.levels);
    model.layers.resize(size_t(s.layers));
    for (size_t n = 0; n < model.layers.size(); ++n) {
        DepthBlock& b = model.layers[n];
        const DepthLayer& l = w.layers[n];
        visit.vector(b.norm1, l.norm1, 0, s.dim), visit.vector(b.q_norm, l.q_norm, 0, s.head_dim);
        visit.vector(b.k_norm, l.k_norm, 0, s.head_dim), visit.vector(b.norm2, l.norm2, 0, s.dim);
        for (auto* matrices : {&b.q, &b.k, &b.v, &b.out}) matrices->resize(size_t(attentions));
        for (int64_t i = 0; i < attentions; ++i) {
            visit.matrix(b.k[size_t(i)], {l.k, l.k_bias, i, keys, s.dim});
            visit.matrix(b.v[size_t(i)], {l.v, l.v_bias, i, keys, s.dim});
            visit.matrix(b.q[size_t(i)], {l.q, l.q_bias, i, queries, s.dim});
            visit.matrix(b.out[size_t(i)], {l.out, l.out_bias, i, s.dim, queries});
        }
        b.up.resize(size_t(ffns)), b.down.resize(size_t(ffns));
        for (int64_t i = 0; i < ffns; ++i) {
            visit.matrix(b.up[size_t(i)], {l.up, none, i, s.ffn, s.dim, s.gated ? &l.gate : nullptr});
            visit.matrix(b.down[size_t(i)], {l.down, none, i, s.dim, s.ffn});
        }
    }
    model.heads.resize(size_t(s.levels));
    for (auto i = size_t(s.given); i < size_t(s.levels); ++i)
        visit.matrix(model.heads[i], {w.heads[i], w.head_biases[i], 0, s.classes[i], s.dim});
}

const void* at(const Strided& t, int64_t elements) {
    return static_cast<const char*>(t.data) + elements * bytes_of(t.dtype);
}

// Numbers [count] of one set, as floats.
void copy_vector(const Strided& from, int64_t set, int64_t count, float* to) {
    dispatch_float(from.dtype, "depth_decode: weights", [&](auto type) {
        const auto* numbers = static_cast<const decltype(type)*>(at(from, set * from.set));
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(numbers[i * from.row]);
    });
}

// A matrix where it lies.
DepthMatrix matrix_of(const Source& from) {
    DepthMatrix m;
    const auto lines = [&](const Strided& t) { return Lines{at(t, from.set * t.set), t.dtype, t.row}; };
    m.columns = from.columns, m.depth = from.depth, m.gated = from.gate != nullptr;
    if (from.weight.data == nullptr) return m;
    m.lines[1] = lines(from.weight);
    m.lines[0] = m.gated ? lines(*from.gate) : m.lines[1];
    return m;
}

// Counts the floats that the vectors of unpacked weights take, or copies them.
struct Unpacked {
    float* room;  // null: only counts
    int64_t floats = 0;

    void vector(const float*& place, const Strided& from, int64_t set, int64_t count) {
        if (from.data == nullptr) return;
        if (room != nullptr) copy_vector(from, set, count, room + floats), place = room + floats;
        floats += count;
    }

    void matrix(DepthMatrix& place, const Source& from) {
        place = matrix_of(from);
        vector(place.bias, from.bias, from.set, from.columns);
    }
};

// Lays a packed model out: where each item begins, 0 where it is absent.
struct Layout {
    const DepthKernels& kernels;
    bool has_scales;
    int64_t end = kLine;
    std::vector<int64_t> offsets = {};

    void add(bool is_there, int64_t bytes) {
        offsets.push_back(is_there ? end : 0);
        if (is_there) end += ceil_div(bytes, kLine) * kLine;
    }

    void vector(const float*&, const Strided& from, int64_t, int64_t count) { add(from.data != nullptr, count * 4); }

    void matrix(DepthMatrix&, const Source& from) {
        const DepthMatrix m = matrix_of(from);
        const int64_t panels = m.panel_count(kernels), width = panels * 2 * kernels.half_columns;
        add(from.weight.data != nullptr, panels * m.panel_bytes(kernels));
        add(from.weight.data != nullptr && has_scales, width * 4);
        add(from.bias.data != nullptr, width * 4);
    }
};

// Reads a packed model.
struct View {
    const char* base;
    const int64_t* offset;

    const char* next() {
        const int64_t begin = *offset++;
        return begin == 0 ? nullptr : base + begin;
    }

    void vector(const float*& place, const Strided&, int64_t, int64_t) {
        place = reinterpret_cast<const float*>(next());
    }

    void matrix(DepthMatrix& place, const Source& from) {
        place.columns = from.columns, place.depth = from.depth, place.gated = from.gate != nullptr;
        place.panels = next();
        place.scale = reinterpret_cast<const float*>(next());
        place.bias = reinterpret_cast<const float*>(next());
    }
};

// Fills a packed model: vectors at once; matrices wait in a list.
struct Writer {
    View view;
    std::vector<DepthMatrix> matrices = {};

    void vector(const float*& place, const Strided& from, int64_t set, int64_t count) {
        view.vector(place, from, set, count);
        if (place != nullptr) copy_vector(from, set, count, const_cast<float*>(place));
    }

    void matrix(DepthMatrix& place, const Source& from) {
        view.matrix(place, from);
        if (place.bias != nullptr) copy_vector(from.bias, from.set, from.columns, const_cast<float*>(place.bias));
        if (place.panels == nullptr) return;
        DepthMatrix m = matrix_of(from);
        m.panels = place.panels, m.scale = place.scale;
        matrices.push_back(m);
    }
};

// A number that tells shapes apart.
int64_t digest(const DepthShape& s) {
    uint64_t sum = 1469598103934665603u;
    const auto add = [&](int64_t number) { sum = (sum ^ uint64_t(number)) * 1099511628211u; };
    for (int64_t number :
         {s.levels, s.hidden, s.dim, s.layers, s.heads, s.kv_heads, s.head_dim, s.ffn, s.given, int64_t(s.gated)})
        add(number);
    for (const int64_t* per_level : {s.classes, s.attention_sets, s.ffn_sets, s.projection_sets, s.norm_sets})
        for (int64_t l = 0; l < s.levels; ++l) add(per_level[l]);
    return int64_t(sum);
}

Layout layout_of(const PackDepth& p) {
    DepthModel model;
    Layout layout{depth_kernels(p.isa, p.format), p.format == WeightFormat::int8};
    walk(model, p.shape, *p.weights, layout);
    const auto shift = ceil_div(int64_t(sizeof(Header) + layout.offsets.size() * 8), kLine) * kLine;
    for (int64_t& offset : layout.offsets) offset += offset == 0 ? 0 : shift;
    layout.end += shift;
    return layout;
}

void pack_panel(const PackDepth& p, const DepthMatrix& m, int64_t panel, float* room) {
    const DepthKernels& kernels = depth_kernels(p.isa, p.format);
    const GemmKernels& gemm = gemm_kernels(p.isa, DType::float32);
    const int64_t pitch = 2 * kernels.row_bytes;
    for (int half = 0; half < 2; ++half) {
        const HalfPanel part = half_panel(gemm, m, panel, half);
        gemm.pack_columns(part.lines, part.halves, m.depth, reinterpret_cast<uint32_t*>(room));
        char* out = const_cast<char*>(m.panels) + panel * m.panel_bytes(kernels) + half * kernels.row_bytes;
        float* scales = const_cast<float*>(m.scale);
        if (scales != nullptr) scales += (2 * panel + half) * kernels.half_columns;
        kernels.encode(room, m.depth, out, pitch, scales);
    }
}

}  // namespace

HalfPanel half_panel(const GemmKernels& gemm, const DepthMatrix& m, int64_t panel, int half) {
    const int64_t width = gemm.panel_columns / 2, begin = (m.gated ? panel : 2 * panel + half) * gemm.panel_columns;
    const auto columns = [&](int64_t from) { return std::clamp<int64_t>(m.columns - from, 0, width); };
    return {m.lines[m.gated ? half : 1], {{begin, begin + width}, {columns(begin), columns(begin + width)}}};
}

int64_t packed_depth_bytes(const PackDepth& p) { return layout_of(p).end; }

void pack_depth(const PackDepth& p) {
    const Layout layout = layout_of(p);
    prefer_large_pages(p.packed, layout.end);
    auto* base = static_cast<char*>(p.packed);
    auto* header = static_cast<Header*>(p.packed);
    *header = {kMagic, layout.end, int64_t(p.isa), int64_t(p.format), int64_t(layout.offsets.size()), digest(p.shape)};
    std::copy(layout.offsets.begin(), layout.offsets.end(), reinterpret_cast<int64_t*>(header + 1));
    DepthModel model;
    Writer writer{{base, reinterpret_cast<const int64_t*>(header + 1)}};
    walk(model, p.shape, *p.weights, writer);
    std::vector<std::pair<size_t, int64_t>> panels;
    int64_t deepest = 0;
    for (size_t i = 0; i < writer.matrices.size(); ++i) {
        const int64_t count = writer.matrices[i].panel_count(layout.kernels);
        deepest = std::max(deepest, writer.matrices[i].depth);
        for (int64_t j = 0; j < count; ++j) panels.emplace_back(i, j);
    }
    const int64_t floats = deepest * layout.kernels.half_columns;
    const Buffer<float> room(p.threads * floats);
    take_turns(p.threads, int64_t(panels.size()), [&](int t, int64_t i) {
        const auto& [matrix, panel] = panels[size_t(i)];
        pack_panel(p, writer.matrices[matrix], panel, room.data() + t * floats);
    });
}

WeightFormat check_packed_depth(const DepthShape& shape, const void* packed, int64_t bytes, Isa isa) {
    const auto* header = static_cast<const Header*>(packed);
    const bool fits = bytes >= int64_t(sizeof(Header)) && header->magic == kMagic && header->bytes == bytes &&
                      header->isa == int64_t(isa) && header->shape == digest(shape);
    LC_CHECK(fits, "depth_decode: packed must be what pack_depth made of weights of this config on this processor");
    return WeightFormat(header->format);
}

DepthModel packed_model(const DepthShape& shape, const void* packed) {
    DepthModel model;
    DepthWeights nothing;
    nothing.layers.resize(size_t(shape.layers));
    nothing.heads.resize(size_t(shape.levels)), nothing.head_biases.resize(size_t(shape.levels));
    View view{static_cast<const char*>(packed),
              reinterpret_cast<const int64_t*>(static_cast<const Header*>(packed) + 1)};
    walk(model, shape, nothing, view);
    return model;
}

DepthModel unpacked_model(const DepthShape& shape, const DepthWeights& weights, float* room) {
    DepthModel model;
    Unpacked visit{room};
    walk(model, shape, weights, visit);
    return model;
}

int64_t vector_floats(const DepthShape& shape, const DepthWeights& weights) {
    DepthModel model;
    Unpacked visit{nullptr};
    walk(model, shape, weights, visit);
    return visit.floats;
}

}  // namespace longcat
