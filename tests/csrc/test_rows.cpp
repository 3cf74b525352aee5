// Normalisation, the gated product, rotary embeddings, sums and the cache's rows against their definitions.
#include <algorithm>

#include "testing.h"

using namespace testing;

namespace {

bool same_bytes(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace

TEST(rms_norm_follows_its_definition) {
    const int64_t shapes[][2] = {{1, 1}, {3, 16}, {2, 33}, {5, 511}, {1, 513}, {70, 1030}};
    for (const auto& [M, K] : shapes) {
        const std::vector<float> x = normal_values(M * K, 3.0f), weight = normal_values(K);
        std::vector<float> out = poisoned<float>(M * K);
        auto args = args_with<hb_rms_norm_args>(any_of({1, 3}));
        args.x = x.data(), args.M = M, args.K = K, args.weight = weight.data(), args.eps = 0.01, args.out = out.data();
        EXPECT(hb_rms_norm(&args) == HB_OK, "%d x %d", (int)M, (int)K);
        for (int64_t row = 0; row < M; ++row) {
            double squares = 0;
            for (int64_t k = 0; k < K; ++k) squares += std::pow(x[static_cast<size_t>(row * K + k)], 2.0);
            const double factor = 1 / std::sqrt(squares / static_cast<double>(K) + 0.01);
            for (int64_t k = 0; k < K; ++k) {
                const double want = x[static_cast<size_t>(row * K + k)] * factor * weight[static_cast<size_t>(k)];
                const double found = out[static_cast<size_t>(row * K + k)];
                EXPECT(std::fabs(found - want) <= 1e-6 * std::fabs(want), "row %d: %g, not %g", (int)row, found, want);
            }
        }
    }
}

TEST(argmax_is_the_first_of_the_greatest) {
    const int64_t shapes[][2] = {{1, 1}, {3, 16}, {2, 33}, {5, 511}, {1, 513}, {7, 1025}, {70, 1030}};
    for (const auto& [M, K] : shapes) {
        std::vector<float> x = normal_values(M * K);
        for (int i = 0; i < 3; ++i) x[static_cast<size_t>(any_of({0, M * K - 1, M * K / 2}))] = 5;  // equals, somewhere
        std::vector<int64_t> out = poisoned<int64_t>(M);
        auto args = args_with<hb_argmax_args>(any_of({1, 3}));
        args.x = x.data(), args.M = M, args.K = K, args.out = out.data();
        EXPECT(hb_argmax(&args) == HB_OK, "%d x %d", (int)M, (int)K);
        for (int64_t row = 0; row < M; ++row) {
            const auto begin = x.begin() + row * K;
            const int64_t want = std::max_element(begin, begin + K) - begin;
            EXPECT(out[static_cast<size_t>(row)] == want, "row %d of %d x %d", (int)row, (int)M, (int)K);
        }
    }
}

TEST(argmax_of_rows_without_one) {
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
    const struct {
        float x[3];
        int64_t place;
    } rows[] = {
        {{0, infinity, 1}, -1},
        {{-infinity, -infinity, -infinity}, -1},
        {{-infinity, -3, -infinity}, 1},
        {{0, nan, 1}, -1},
        {{0, 2, -nan}, -1},
        {{-1, -0.0f, 0}, 1},
        {{0, -0.0f, -1}, 0},
        {{-2, -1, -1}, 1},
        {{std::numeric_limits<float>::denorm_min(), 0, 0}, 0},
    };
    for (const auto& row : rows) {
        int64_t out = 7;
        auto args = args_with<hb_argmax_args>();
        args.x = row.x, args.M = 1, args.K = 3, args.out = &out;
        EXPECT(hb_argmax(&args) == HB_OK && out == row.place, "%g, %g, %g: %d, not %d", row.x[0], row.x[1], row.x[2],
               (int)out, (int)row.place);
    }
    int64_t empty[2] = {7, 7};
    auto args = args_with<hb_argmax_args>();
    args.M = 2, args.out = empty;
    EXPECT(hb_argmax(&args) == HB_OK && empty[0] == -1 && empty[1] == -1, "rows of nothing");
}

TEST(swiglu_follows_its_definition) {
    for (const int64_t n : {1, 15, 511, 513, 70000}) {
        std::vector<float> gate = normal_values(n, 20.0f);
        const std::vector<float> up = normal_values(n);
        gate[0] = any_of({0, -87, 87});
        std::vector<float> out = poisoned<float>(n);
        auto args = args_with<hb_swiglu_args>(any_of({1, 3}));
        args.gate = gate.data(), args.up = up.data(), args.n = n, args.out = out.data();
        EXPECT(hb_swiglu(&args) == HB_OK, "n %d", (int)n);
        for (size_t i = 0; i < gate.size(); ++i) {
            const double g = gate[i], want = g / (1 + std::exp(-g)) * up[i];
            EXPECT(std::fabs(out[i] - want) <= 4e-7 * std::fabs(want) + 1e-36, "%g * %g: %g", g, up[i], out[i]);
        }
    }
}

TEST(swiglu_at_the_ends) {
    const float infinity = std::numeric_limits<float>::infinity();
    const float gate[] = {infinity, 1000.0f, -1000.0f, -infinity, std::nanf(""), 0.0f};
    const float up[] = {1, 1, 1, 1, 1, 1};
    float out[6];
    auto args = args_with<hb_swiglu_args>();
    args.gate = gate, args.up = up, args.n = 6, args.out = out;
    EXPECT(hb_swiglu(&args) == HB_OK, "six values");
    EXPECT(out[0] == infinity && out[1] == 1000.0f, "large: %g %g", out[0], out[1]);
    EXPECT(out[2] == 0 && std::signbit(out[2]), "very negative: %g", out[2]);
    EXPECT(std::isnan(out[3]) && std::isnan(out[4]), "no numbers: %g %g", out[3], out[4]);
    EXPECT(out[5] == 0, "zero: %g", out[5]);
}

TEST(rotary_follows_its_definition) {
    const int64_t shapes[][4] = {{1, 1, 1, 2},   {3, 4, 2, 6},    {2, 8, 8, 34},
                                 {7, 5, 1, 128}, {40, 32, 4, 64}, {0, 2, 2, 4}};
    for (const auto& [T, H, G, D] : shapes) {
        const std::vector<float> cos = normal_values(T * D), sin = normal_values(T * D);
        const std::vector<float> query = normal_values(T * H * D), key = normal_values(T * G * D);
        std::vector<float> query_out = query, key_out = key;
        auto args = args_with<hb_rotary_args>(any_of({1, 3}));
        args.query = query_out.data(), args.key = key_out.data(), args.cos = cos.data(), args.sin = sin.data();
        args.T = T, args.H = H, args.G = G, args.D = D;
        EXPECT(hb_rotary(&args) == HB_OK, "%d x %d", (int)T, (int)D);
        const std::pair<const std::vector<float>*, const std::vector<float>*> both[] = {{&query, &query_out},
                                                                                        {&key, &key_out}};
        for (const auto& [before, after] : both) {
            const int64_t heads = before == &query ? H : G;
            for (int64_t i = 0; i < T * heads * D; ++i) {
                const int64_t t = i / D / heads, d = i % D, other = d < D / 2 ? i + D / 2 : i - D / 2;
                const size_t angle = static_cast<size_t>(t * D + d);
                const double straight = double{(*before)[static_cast<size_t>(i)]} * cos[angle];
                const double across = double{(*before)[static_cast<size_t>(other)]} * sin[angle] * (d < D / 2 ? -1 : 1);
                const double found = (*after)[static_cast<size_t>(i)], want = straight + across;
                const double allowed = 2e-7 * (std::fabs(straight) + std::fabs(across));
                EXPECT(std::fabs(found - want) <= allowed, "%d: %g, not %g", (int)i, found, want);
            }
        }
    }
}

TEST(add_is_the_sum_rounded_once) {
    for (const int64_t n : {1, 511, 513, 70000}) {
        const std::vector<float> a = normal_values(n), b = normal_values(n);
        std::vector<float> out = poisoned<float>(n);
        auto args = args_with<hb_add_args>(any_of({1, 3}));
        args.a = a.data(), args.b = b.data(), args.n = n, args.out = out.data();
        EXPECT(hb_add(&args) == HB_OK, "n %d", (int)n);
        for (size_t i = 0; i < a.size(); ++i) EXPECT(out[i] == a[i] + b[i], "%g + %g: %g", a[i], b[i], out[i]);
        std::vector<float> own = a;
        args.a = own.data(), args.out = own.data();
        EXPECT(hb_add(&args) == HB_OK && own == out, "in place, n %d", (int)n);
    }
}

TEST(cache_rows_go_to_their_slots_and_nowhere_else) {
    const int64_t shapes[][4] = {{1, 1, 1, 1}, {5, 2, 3, 4}, {4, 3, 0, 8}, {900, 4, 32, 16}};
    for (const auto& [T, G, D, E] : shapes) {
        const int64_t slot_count = 2 * T + 3, gap = any_of({0, 5});
        const std::vector<float> key = normal_values(T * (G * D + gap)), value = normal_values(T * G * (E + gap));
        std::vector<float> keys = poisoned<float>(slot_count * G * D), values = poisoned<float>(slot_count * G * E);
        std::vector<float> want_keys = keys, want_values = values;
        std::vector<int64_t> slots(static_cast<size_t>(T));
        for (int64_t t = 0; t < T; ++t) slots[static_cast<size_t>(t)] = 2 * t + 1;
        std::shuffle(slots.begin(), slots.end(), generator);
        if (T > 3) slots[0] = -1, slots[1] = slot_count, slots[2] = std::numeric_limits<int64_t>::min();
        const auto copy = [&](const float* from, int64_t size, int64_t slot, std::vector<float>& to) {
            for (int64_t i = 0; i < size; ++i) to[static_cast<size_t>(slot * size + i)] = from[i];
        };
        for (int64_t t = 0; t < T; ++t) {
            const int64_t slot = slots[static_cast<size_t>(t)];
            if (slot < 0 || slot >= slot_count) continue;
            copy(key.data() + t * (G * D + gap), G * D, slot, want_keys);
            for (int64_t g = 0; g < G; ++g) copy(value.data() + (t * G + g) * (E + gap), E, slot * G + g, want_values);
        }
        auto args = args_with<hb_cache_write_args>(any_of({1, 3}));
        args.key = key.data(), args.key_row_stride = G * D + gap, args.key_head_stride = D;
        args.value = value.data(), args.value_row_stride = G * (E + gap), args.value_head_stride = E + gap;
        args.T = T, args.G = G, args.D = D, args.E = E, args.slots = slots.data(), args.slot_count = slot_count;
        args.keys = keys.data(), args.values = values.data();
        EXPECT(hb_cache_write(&args) == HB_OK, "%d rows", (int)T);
        EXPECT(same_bytes(keys, want_keys) && same_bytes(values, want_values), "%d rows", (int)T);
    }
}
