// Products in 16-bit fixed point (csrc/cpu/fixed.h) against their definition in plain loops, bit for bit; other levels
// multiply differently and are not tested here.
#include <algorithm>
#include <functional>

#include "formats.h"
#include "weight4.h"

using namespace testing;

namespace {

constexpr int64_t kGroup = 64;

// A weight as integers: at(n, k), and what one of them stands for in each group.
struct Integers {
    int64_t N, K, bits;  // of a magnitude of x
    std::function<int64_t(int64_t n, int64_t k)> at;
    std::function<float(int64_t n, int64_t group)> scale;
};

Integers integers_of(const Weight& w) {
    const float unit = w.format == HB_NF4 ? hb::kNf4FixedUnit : hb::kFp4FixedUnit;
    const auto values = table(w.format == HB_NF4 ? HB_TABLE_NF4 : HB_TABLE_FP4);
    return {w.N, w.K, 13, [&w, unit, values](int64_t n, int64_t k) { return std::lround(unit * values[w.code(n, k)]); },
            [&w, unit](int64_t n, int64_t group) {
                return w.absmax[static_cast<size_t>((n * w.K + group * kGroup) / w.blocksize)] * (1 / unit);
            }};
}

// One group of x as integers, and what one of them stands for.
float round_group(const double* x, int64_t bits, int64_t* out) {
    double largest = 0;
    bool has_nan = false;
    for (int64_t i = 0; i < kGroup; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
        has_nan |= std::isnan(x[i]);
    }
    if (has_nan || std::isinf(largest)) {
        for (int64_t i = 0; i < kGroup; ++i) out[i] = !std::isinf(x[i]) ? 0 : x[i] < 0 ? -1 : 1;
        return has_nan ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    }
    const int exponent = largest == 0 ? -100 : std::max(std::ilogb(largest), -100);
    const double unit = std::ldexp(1.0, exponent - static_cast<int>(bits - 1));
    for (int64_t i = 0; i < kGroup; ++i) out[i] = static_cast<int64_t>(std::nearbyint(x[i] / unit));
    return static_cast<float>(unit);
}

uint16_t expected(const Integers& w, const std::vector<uint16_t>& x, int64_t m, int64_t n, float bias) {
    float total = 0;
    for (int64_t k = 0; k < w.K; k += kGroup) {
        double values[kGroup];
        int64_t rounded[kGroup], sum = 0;
        for (int64_t i = 0; i < kGroup; ++i) values[i] = value_at(x, m * w.K + k + i, HB_BFLOAT16);
        const float unit = round_group(values, w.bits, rounded);
        for (int64_t i = 0; i < kGroup; ++i) sum += rounded[i] * w.at(n, k + i);
        total = std::fma(static_cast<float>(sum), w.scale(n, k / kGroup) * unit, total);
    }
    return bfloat(total + bias);
}

void expect_the_same(const Integers& w, const std::vector<uint16_t>& x, int64_t M, const std::vector<float>& bias,
                     const std::vector<uint16_t>& out) {
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < w.N; ++n) {
            const uint16_t want = expected(w, x, m, n, bias[static_cast<size_t>(n)]);
            const uint16_t got = out[static_cast<size_t>(m * w.N + n)];
            const bool are_nan = std::isnan(value_of(want, 7)) && std::isnan(value_of(got, 7));
            EXPECT(got == want || are_nan, "out[%d, %d] of %d x %d x %d is %g, not %g", (int)m, (int)n, (int)M,
                   (int)w.N, (int)w.K, value_of(got, 7), value_of(want, 7));
        }
    }
}

// Groups of everything that 16 bits can hold: zeros and subnormal values, the smallest and the largest exponents, and,
// in their own groups, infinities and NaNs.
std::vector<uint16_t> hostile_values(int64_t count) {
    std::vector<uint16_t> values = bfloats(normal_values(count));
    for (int64_t first = 0; first + kGroup <= count; first += kGroup) {
        const int64_t kind = any_of({0, 1, 2, 3, 4, 5, 6, 7});
        for (int64_t i = first; i < first + kGroup; ++i) {
            uint16_t& value = values[static_cast<size_t>(i)];
            const auto any = static_cast<uint16_t>(generator());
            if (kind == 1) value = 0x8000 & any;
            if (kind == 2) value = static_cast<uint16_t>(any & 0x807f);             // subnormal
            if (kind == 3) value = static_cast<uint16_t>((any & 0x8fff) | 0x0080);  // below 2^-96
            if (kind == 4) value = static_cast<uint16_t>((any & 0xbfff));           // below 2
        }
        if (kind == 5) values[static_cast<size_t>(first + any_of({0, 31, 63}))] = 0x7f80;
        if (kind == 6) values[static_cast<size_t>(first + any_of({0, 32, 63}))] = 0xff80;
        if (kind == 7) values[static_cast<size_t>(first + any_of({1, 33, 62}))] = 0xffc0;
    }
    return values;
}

const std::vector<int64_t> kRows = {1, 2, 3, 4, 5, 6, 7, 8, 13};

}  // namespace

TEST(products_in_fixed_point_are_what_they_are_defined_to_be) {
    if (!multiplies_in_fixed_point()) return;
    const int64_t shapes[][3] = {{1, 64, 64}, {7, 128, 64}, {8, 192, 64}, {9, 576, 64}, {16, 1088, 64}, {37, 512, 256}};
    for (const auto& [N, K, blocksize] : shapes) {
        for (const int64_t M : kRows) {
            const Weight w(N, K, any_of({0, 1}) == 1, blocksize);
            const std::vector<float> bias = normal_values(N);
            for (const std::vector<uint16_t>& x : {bfloats(normal_values(M * K)), hostile_values(M * K)}) {
                const std::vector<uint16_t> out =
                    run_linear4({hb_linear4_workspace, hb_linear4}, w, x, M, &bias, any_of({1, 3}), any_of({0, 1}));
                expect_the_same(integers_of(w), x, M, bias, out);
            }
        }
    }
}

TEST(products_with_int8_weights_in_fixed_point_are_what_they_are_defined_to_be) {
    if (!multiplies_in_fixed_point()) return;
    for (const auto& [N, K] : {std::pair<int64_t, int64_t>{1, 64}, {7, 128}, {9, 576}, {16, 1088}, {37, 512}}) {
        for (const int64_t M : kRows) {
            std::vector<int8_t> codes(static_cast<size_t>(N * K));
            for (int8_t& code : codes) code = static_cast<int8_t>(generator());
            const std::vector<float> absmax = normal_values(N), bias = normal_values(N);
            const Integers w = {
                N, K, 15, [&, k_of = K](int64_t n, int64_t k) { return codes[static_cast<size_t>(n * k_of + k)]; },
                [&](int64_t n, int64_t) { return absmax[static_cast<size_t>(n)] * (1 / 127.0f); }};
            for (const std::vector<uint16_t>& x : {bfloats(normal_values(M * K)), hostile_values(M * K)}) {
                std::vector<uint16_t> out = poisoned<uint16_t>(M * N);
                auto args = args_with<hb_linear8_args>(any_of({1, 3}));
                args.x = x.data(), args.x_dtype = HB_BFLOAT16, args.M = M, args.N = N, args.K = K;
                args.codes = codes.data(), args.absmax = absmax.data(), args.outlier_rule = HB_OUTLIERS_ALL;
                args.bias = bias.data(), args.bias_dtype = HB_FLOAT32, args.out = out.data();
                int64_t bytes = -1;
                EXPECT(hb_linear8_workspace(&args, &bytes) == HB_OK, "workspace");
                const Workspace workspace(bytes);
                workspace.give_to(args.call);
                EXPECT(hb_linear8(&args) == HB_OK, "M %d N %d K %d", (int)M, (int)N, (int)K);
                expect_the_same(w, x, M, bias, out);
            }
        }
    }
}
