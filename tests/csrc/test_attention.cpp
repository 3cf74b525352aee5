// Attention over a paged cache against float64, with exact-size buffers, blocks full of NaNs and tables full of
// nonsense wherever no row looks; and the promises about rows, chunks and threads.
#include <algorithm>

#include "testing.h"

using namespace testing;

namespace {

struct Options {
    int64_t dtype = HB_FLOAT32, store = HB_FLOAT32, window = 0;
    double softcap = 0;
    bool has_sinks = false;
};

uint16_t bfloat_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Values as the kernel reads them, and as what they stand for. In int8 each `size` of them have a scale.
struct Tensor {
    std::vector<float> floats, scales;
    std::vector<uint16_t> shorts;
    std::vector<int8_t> codes;

    Tensor(std::vector<float> values, int64_t dtype, int64_t size = 0) : floats(std::move(values)) {
        if (dtype == HB_FLOAT32) return;
        if (dtype == HB_INT8) {
            quantize(static_cast<size_t>(size));
            return;
        }
        for (float& value : floats) {
            shorts.push_back(bfloat_bits(value));
            value = static_cast<float>(value_of(shorts.back(), 7));
        }
    }
    const void* data() const {
        if (!codes.empty()) return codes.data();
        return shorts.empty() ? static_cast<const void*>(floats.data()) : shorts.data();
    }
    // Any codes under a scale that is NaN, where values are.
    void quantize(size_t size) {
        for (size_t i = 0; i < floats.size(); i += size) {
            float absmax = 0;
            for (size_t j = i; j < i + size; ++j) absmax = std::max(absmax, std::fabs(floats[j]));
            const bool is_there = !std::isnan(floats[i]);
            scales.push_back(is_there ? absmax / 127 : floats[i]);
            for (size_t j = i; j < i + size; ++j) {
                codes.push_back(static_cast<int8_t>(is_there ? std::nearbyint(floats[j] / scales.back())
                                                             : static_cast<float>(any_of({-128, -1, 0, 5, 127}))));
                floats[j] = static_cast<float>(codes.back()) * scales.back();
            }
        }
    }
};

// A key's scale and a value's side by side.
std::vector<float> side_by_side(const std::vector<float>& a, const std::vector<float>& b) {
    std::vector<float> both;
    for (size_t i = 0; i < a.size(); ++i) both.push_back(a[i]), both.push_back(b[i]);
    return both;
}

// Whole sequences in a cache of their own: all that any chunk of them needs.
struct Sequences {
    int64_t H, G, D, E, block_tokens, blocks, max_blocks;
    Options options;
    std::vector<int64_t> lengths, tables;
    std::vector<std::vector<float>> queries;  // [length, H, D] of each
    Tensor keys, values, sinks;
    std::vector<float> scales;

    Sequences(int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim, int64_t tokens,
              std::vector<int64_t> rows, Options chosen)
        : H(heads),
          G(groups),
          D(key_dim),
          E(value_dim),
          block_tokens(tokens),
          blocks(2),
          max_blocks(3),
          options(chosen),
          lengths(std::move(rows)),
          keys({}, HB_FLOAT32),
          values({}, HB_FLOAT32),
          sinks(normal_values(H), chosen.dtype) {
        for (const int64_t length : lengths) {
            blocks += ceil_div(length, block_tokens);
            max_blocks = std::max(max_blocks, ceil_div(length, block_tokens) + 1);
            queries.push_back(normal_values(length * H * D, 2.0f));
        }
        std::vector<int64_t> free(static_cast<size_t>(blocks));
        for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int64_t>(i);
        std::shuffle(free.begin(), free.end(), generator);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::vector<float> k(static_cast<size_t>(blocks * block_tokens * G * D), nan);
        std::vector<float> v(static_cast<size_t>(blocks * block_tokens * G * E), nan);
        tables.assign(lengths.size() * static_cast<size_t>(max_blocks), int64_t{1} << 50);
        for (size_t s = 0; s < lengths.size(); ++s) {
            for (int64_t p = 0; p < lengths[s]; ++p) {
                int64_t& block = tables[s * static_cast<size_t>(max_blocks) + static_cast<size_t>(p / block_tokens)];
                if (p % block_tokens == 0) block = free.back(), free.pop_back();
                const int64_t slot = block * block_tokens + p % block_tokens;
                const auto key = normal_values(G * D), value = normal_values(G * E);
                std::copy(key.begin(), key.end(), k.begin() + slot * G * D);
                std::copy(value.begin(), value.end(), v.begin() + slot * G * E);
            }
        }
        keys = Tensor(k, options.store, D), values = Tensor(v, options.store, E);
        scales = side_by_side(keys.scales, values.scales);
    }

    // [rows, H, E]: rows first .. first + count - 1 of sequence s, in float64.
    void expect(size_t s, int64_t first, int64_t count, const Tensor& query, const std::vector<double>& out) const {
        for (int64_t i = 0; i < count * H; ++i) {
            const int64_t position = first + i / H, head = i % H, kv_head = head / (H / G);
            const int64_t begin = options.window == 0 ? 0 : std::max<int64_t>(0, position - options.window + 1);
            std::vector<double> scores, sum(static_cast<size_t>(E)), sizes(static_cast<size_t>(E));
            std::vector<int64_t> slots;
            double total = 0, largest_size = 0;
            for (int64_t p = begin; p <= position; ++p) {
                const int64_t block =
                    tables[s * static_cast<size_t>(max_blocks) + static_cast<size_t>(p / block_tokens)];
                slots.push_back(block * block_tokens + p % block_tokens);
                double score = 0, size = 0;
                for (int64_t d = 0; d < D; ++d) {
                    const double term = static_cast<double>(query.floats[static_cast<size_t>(i * D + d)]) *
                                        keys.floats[static_cast<size_t>((slots.back() * G + kv_head) * D + d)];
                    score += term, size += std::fabs(term) * kScale;
                }
                largest_size = std::max(largest_size, size);
                score *= kScale;
                if (options.softcap > 0) score = options.softcap * std::tanh(score / options.softcap);
                scores.push_back(score);
            }
            double largest = *std::max_element(scores.begin(), scores.end());
            if (options.has_sinks) total = std::exp(sinks.floats[static_cast<size_t>(head)] - largest);
            for (size_t p = 0; p < scores.size(); ++p) {
                const double weight = std::exp(scores[p] - largest);
                total += weight;
                for (int64_t e = 0; e < E; ++e) {
                    const double term = weight * values.floats[static_cast<size_t>((slots[p] * G + kv_head) * E + e)];
                    sum[static_cast<size_t>(e)] += term, sizes[static_cast<size_t>(e)] += std::fabs(term);
                }
            }
            // A score is off by what adding D products loses, and its weight by as much of itself; then the weights and
            // the weighted values are added up. bfloat16 rounds weights and results to 8 bits each.
            const double added = static_cast<double>(D) * largest_size + 2 * static_cast<double>(scores.size()) + 16;
            const double lost = options.dtype == HB_FLOAT32 ? std::ldexp(added, -24) : 0.02;
            for (int64_t e = 0; e < E; ++e) {
                const double exact = sum[static_cast<size_t>(e)] / total;
                const double error = std::fabs(out[static_cast<size_t>(i * E + e)] - exact);
                const double size =
                    options.dtype == HB_FLOAT32 ? sizes[static_cast<size_t>(e)] / total : 1 + std::fabs(exact);
                EXPECT(error <= lost * size, "position %d head %d value %d: off by %g", (int)position, (int)head,
                       (int)e, error);
            }
        }
    }

    static constexpr double kScale = 0.25;
};

struct Part {
    size_t sequence;
    int64_t first, rows;
};

// One call with the given chunks; its output bits, [T, H, E], widened to 32 bits. Row and head strides are odd on
// purpose.
std::vector<uint32_t> run(const Sequences& all, const std::vector<Part>& parts, int64_t threads, bool checks = false) {
    const Options& options = all.options;
    std::vector<int64_t> tables, offsets = {0}, starts;
    std::vector<float> packed, dense;
    const int64_t head_stride = all.D + 3, row_stride = all.H * head_stride + 5;
    for (const Part& part : parts) {
        const auto row = all.tables.begin() + static_cast<int64_t>(part.sequence) * all.max_blocks;
        tables.insert(tables.end(), row, row + all.max_blocks);
        offsets.push_back(offsets.back() + part.rows);
        starts.push_back(part.first);
        const float* from = all.queries[part.sequence].data() + part.first * all.H * all.D;
        dense.insert(dense.end(), from, from + part.rows * all.H * all.D);
    }
    const int64_t T = offsets.back();
    packed.assign(static_cast<size_t>((T - 1) * row_stride + (all.H - 1) * head_stride + all.D), 1e30f);
    for (int64_t i = 0; i < T * all.H; ++i) {
        std::copy(dense.begin() + i * all.D, dense.begin() + (i + 1) * all.D,
                  packed.begin() + i / all.H * row_stride + i % all.H * head_stride);
    }
    const Tensor query(packed, options.dtype);
    std::vector<float> floats = poisoned<float>(options.dtype == HB_FLOAT32 ? T * all.H * all.E : 0);
    std::vector<uint16_t> shorts = poisoned<uint16_t>(options.dtype == HB_FLOAT32 ? 0 : T * all.H * all.E);

    auto args = args_with<hb_paged_attention_args>(threads);
    args.query = query.data(), args.query_row_stride = row_stride, args.query_head_stride = head_stride;
    args.keys = all.keys.data(), args.values = all.values.data(), args.dtype = options.dtype, args.T = T;
    args.store_dtype = options.store, args.scales = options.store == HB_INT8 ? all.scales.data() : nullptr;
    args.H = all.H, args.G = all.G, args.D = all.D, args.E = all.E, args.blocks = all.blocks;
    args.block_tokens = all.block_tokens, args.tables = tables.data(), args.S = static_cast<int64_t>(parts.size());
    args.max_blocks = all.max_blocks, args.offsets = offsets.data(), args.starts = starts.data();
    args.scale = Sequences::kScale, args.window = options.window, args.softcap = options.softcap;
    args.sinks = options.has_sinks ? all.sinks.data() : nullptr, args.sinks_dtype = options.dtype;
    args.out = floats.empty() ? static_cast<void*>(shorts.data()) : floats.data();
    int64_t bytes = -1;
    EXPECT(hb_paged_attention_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(hb_paged_attention(&args) == HB_OK, "T %d", (int)T);

    if (checks) {
        const Tensor plain(dense, options.dtype);
        for (size_t i = 0; i < parts.size(); ++i) {
            const int64_t begin = offsets[i] * all.H, end = offsets[i + 1] * all.H;
            Tensor query_rows({}, HB_FLOAT32);
            query_rows.floats.assign(plain.floats.begin() + begin * all.D, plain.floats.begin() + end * all.D);
            std::vector<double> out;
            for (int64_t j = begin * all.E; j < end * all.E; ++j) {
                out.push_back(floats.empty() ? value_at(shorts, j, options.dtype) : floats[static_cast<size_t>(j)]);
            }
            all.expect(parts[i].sequence, parts[i].first, parts[i].rows, query_rows, out);
        }
    }
    std::vector<uint32_t> bits(shorts.begin(), shorts.end());
    bits.resize(static_cast<size_t>(T * all.H * all.E));
    if (!floats.empty()) memcpy(bits.data(), floats.data(), floats.size() * sizeof(float));
    return bits;
}

}  // namespace

// A dtype of queries, and one of the cache.
constexpr int64_t kDtypes[][2] = {{HB_FLOAT32, HB_FLOAT32}, {HB_BFLOAT16, HB_BFLOAT16}, {HB_FLOAT32, HB_INT8},
                                  {HB_BFLOAT16, HB_INT8},   {HB_FLOAT32, HB_BFLOAT16},  {HB_BFLOAT16, HB_FLOAT32}};

TEST(attention_is_right_at_every_shape) {
    const int64_t shapes[][4] = {{4, 4, 16, 16}, {8, 1, 80, 96}, {6, 2, 7, 33},   {2, 1, 129, 64},
                                 {3, 3, 1, 1},   {8, 1, 64, 64}, {40, 2, 32, 80}, {2, 2, 128, 128}};
    for (const auto& [H, G, D, E] : shapes) {
        for (const auto& [dtype, store] : kDtypes) {
            Options options;
            options.dtype = dtype, options.store = store, options.window = any_of({0, 0, 1, 17, 64, 65});
            options.softcap = static_cast<double>(any_of({0, 0, 3})), options.has_sinks = any_of({0, 1}) == 1;
            const Sequences all(H, G, D, E, any_of({1, 3, 16, 32}), {1, any_of({63, 64, 65}), 90}, options);
            const int64_t length = all.lengths[1];
            run(all, {{0, 0, 1}, {1, 0, length}, {2, 50, 40}}, any_of({1, 3}), true);
            run(all, {{2, 89, 1}, {1, length - 1, 1}}, any_of({1, 5}), true);
        }
    }
}

TEST(attention_over_several_spans_is_right) {
    for (const auto& [dtype, store] : kDtypes) {
        Options options;
        options.dtype = dtype, options.store = store, options.window = any_of({0, 600, 511});
        const Sequences all(2, 1, any_of({16, 64}), 16, 16, {1100, any_of({512, 513, 1024})}, options);
        run(all, {{0, 1099, 1}}, 4, true);
        run(all, {{0, 1000, 100}, {1, 500, 12}}, 2, true);
    }
}

// Rows of one sequence in any chunks, beside others or alone, by any number of threads.
TEST(a_row_of_attention_is_the_same_in_every_chunk) {
    for (const auto& [dtype, store] : kDtypes) {
        Options options;
        options.dtype = dtype, options.store = store, options.window = any_of({0, 70, 530});
        options.softcap = any_of({0, 1}) == 1 ? 5.0 : 0.0;
        options.has_sinks = any_of({0, 1}) == 1;
        const bool is_for_tiles = any_of({0, 1}) == 1;  // D and E are such that they may be taken
        const int64_t D = is_for_tiles ? any_of({32, 64}) : any_of({16, 40, 33}), E = is_for_tiles ? 64 : 24;
        const Sequences all(6, any_of({1, 2, 6}), D, E, any_of({5, 16}), {600, 70}, options);
        const std::vector<uint32_t> whole = run(all, {{0, 0, 600}}, 2);
        const int64_t row_values = all.H * all.E;
        for (int64_t first = 0; first < 600;) {
            const int64_t rows = std::min<int64_t>(any_of({1, 2, 7, 64, 200}), 600 - first);
            std::vector<Part> parts = {{0, first, rows}};
            if (any_of({0, 1}) == 1) parts.insert(parts.begin(), {1, 0, 70});
            const std::vector<uint32_t> chunk = run(all, parts, any_of({1, 2, 7}));
            const auto mine = chunk.end() - rows * row_values;
            EXPECT(std::equal(mine, chunk.end(), whole.begin() + first * row_values), "rows %d to %d, dtype %d",
                   (int)first, (int)(first + rows), (int)dtype);
            first += rows;
        }
    }
}

// What is written into a cache in int8 is within half a step of what it was; all that is beside it stays as it was.
TEST(rows_are_rounded_to_int8) {
    const int64_t shapes[][3] = {{1, 1, 1}, {2, 16, 33}, {3, 128, 7}};
    for (const auto& [G, D, E] : shapes) {
        for (const int64_t dtype : {HB_FLOAT32, HB_BFLOAT16}) {
            const int64_t T = 9, slot_count = 20;
            const std::vector<int64_t> slots = {3, -1, 0, 19, 20, 7, int64_t{1} << 60, 8, 12};
            std::vector<float> raw[2] = {normal_values(T * G * D), normal_values(T * G * E, 100)};
            raw[0][0] = std::numeric_limits<float>::infinity();  // of the first row's first key
            const Tensor key(raw[0], dtype), value(raw[1], dtype);
            std::vector<int8_t> keys = poisoned<int8_t>(slot_count * G * D),
                                values = poisoned<int8_t>(slot_count * G * E);
            std::vector<float> scales = poisoned<float>(slot_count * G * 2);
            const auto keys_before = keys, values_before = values;
            const auto scales_before = scales;
            auto args = args_with<hb_cache_write_args>(any_of({1, 3}));
            args.key = key.data(), args.key_row_stride = G * D, args.key_head_stride = D;
            args.value = value.data(), args.value_row_stride = G * E, args.value_head_stride = E, args.dtype = dtype;
            args.T = T, args.G = G, args.D = D, args.E = E, args.slots = slots.data(), args.slot_count = slot_count;
            args.store_dtype = HB_INT8, args.keys = keys.data(), args.values = values.data();
            args.scales = scales.data();
            EXPECT(hb_cache_write(&args) == HB_OK, "G %d", (int)G);
            for (int64_t slot = 0; slot < slot_count; ++slot) {
                const int64_t t = std::find(slots.begin(), slots.end(), slot) - slots.begin();
                for (int64_t i = 0; i < G * 2; ++i) {
                    const int64_t head = i / 2, size = i % 2 == 0 ? D : E, place = slot * G + head;
                    const float scale = scales[static_cast<size_t>(place * 2 + i % 2)];
                    const auto& store = i % 2 == 0 ? keys : values;
                    const auto& before = i % 2 == 0 ? keys_before : values_before;
                    const float* const from =
                        (i % 2 == 0 ? key : value).floats.data() + (std::min(t, T - 1) * G + head) * size;
                    float absmax = 0;
                    for (int64_t d = 0; t < T && d < size; ++d) absmax = std::max(absmax, std::fabs(from[d]));
                    const bool is_finite = std::isfinite(absmax);
                    EXPECT(t == T || std::isnan(scale) == !is_finite, "slot %d", (int)slot);
                    EXPECT(t < T || memcmp(&scale, &scales_before[static_cast<size_t>(place * 2)], 4) == 0, "slot %d",
                           (int)slot);
                    for (int64_t d = 0; d < size; ++d) {
                        const int8_t code = store[static_cast<size_t>(place * size + d)];
                        if (t == T) {
                            EXPECT(code == before[static_cast<size_t>(place * size + d)], "slot %d", (int)slot);
                        } else if (!is_finite) {
                            EXPECT(code == 0, "slot %d", (int)slot);
                        } else {
                            const double error = std::fabs(static_cast<double>(code) * scale - from[d]);
                            EXPECT(error <= absmax * (1 / 254.0 + 0x1p-21), "off by %g of %g", error, absmax);
                        }
                    }
                }
            }
        }
    }
}
