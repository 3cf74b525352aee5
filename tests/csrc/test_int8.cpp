// Rowwise int8 and LLM.int8() against scalar oracles, outliers included.
#include "testing.h"

using namespace testing;

namespace {

struct Weight {
    int64_t N, K;
    std::vector<int8_t> codes;
    std::vector<float> absmax;

    Weight(int64_t n, int64_t k) : N(n), K(k), codes(poisoned<int8_t>(n * k)), absmax(poisoned<float>(n)) {
        std::vector<float> w = normal_values(N * K);
        if (N > 1) std::fill(w.begin(), w.begin() + K, 0.0f);
        auto args = args_with<hb_quantize8_args>(any_of({1, 2}));
        args.w = w.data(), args.N = N, args.K = K, args.codes = codes.data(), args.absmax = absmax.data();
        EXPECT(hb_quantize8(&args) == HB_OK, "%d x %d", (int)N, (int)K);
        for (int64_t i = 0; i < N * K; ++i) {
            const double step = absmax[static_cast<size_t>(i / K)] / 127.0;
            const double back = codes[static_cast<size_t>(i)] * step;
            const double value = w[static_cast<size_t>(i)];
            // Half a step, and what rounding to float16 takes.
            EXPECT(std::fabs(back - value) <= step * 0.50001 + std::fabs(value) / 2048, "%g for %g", back, value);
        }
    }
};

// The sum that LLM.int8() defines, in float64: outliers against the dequantized weight, the rest in codes.
double expected(const Weight& w, const std::vector<float>& x, int64_t M, int64_t m, int64_t n, double threshold,
                bool batch) {
    const auto value = [&](int64_t row, int64_t k) { return x[static_cast<size_t>(row * w.K + k)]; };
    const auto by_value = [&](int64_t row, int64_t k) {
        return threshold > 0 && std::fabs(value(row, k)) >= threshold;
    };
    const auto outlier = [&](int64_t k) {
        if (!batch) return by_value(m, k);
        for (int64_t row = 0; row < M; ++row) {
            if (by_value(row, k)) return true;
        }
        return false;
    };
    float largest = 0;
    for (int64_t k = 0; k < w.K; ++k) {
        if (!by_value(m, k)) largest = std::max(largest, std::fabs(value(m, k)));
    }
    const float factor = largest == 0 ? 0.0f : 1.0f / largest * 127.0f;
    double ordinary = 0, outliers = 0;
    for (int64_t k = 0; k < w.K; ++k) {
        const double weight = w.codes[static_cast<size_t>(n * w.K + k)];
        if (outlier(k)) {
            outliers += value(m, k) * weight;
        } else {
            ordinary += std::nearbyint(value(m, k) * factor) * weight;
        }
    }
    const double row = w.absmax[static_cast<size_t>(n)];
    return ordinary * largest * row / (127.0 * 127.0) + outliers * row / 127.0;
}

// hb_linear8 of M rows of x, float32 or, as uint16_t, bfloat16.
template <typename T>
std::vector<T> run8(const Weight& w, const T* x, int64_t M, double threshold, int64_t rule, int64_t threads) {
    std::vector<T> out = poisoned<T>(M * w.N);
    auto args = args_with<hb_linear8_args>(threads);
    args.x_dtype = sizeof(T) == sizeof(float) ? HB_FLOAT32 : HB_BFLOAT16;
    args.x = x, args.M = M, args.N = w.N, args.K = w.K, args.codes = w.codes.data();
    args.absmax = w.absmax.data(), args.threshold = threshold, args.outlier_rule = rule;
    args.out = out.data();
    int64_t bytes = -1;
    EXPECT(hb_linear8_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(hb_linear8(&args) == HB_OK, "M %d N %d K %d", (int)M, (int)w.N, (int)w.K);
    return out;
}

}  // namespace

TEST(llm_int8_follows_its_definition) {
    const int64_t shapes[][3] = {{1, 1, 1}, {1, 3, 64}, {2, 5, 33}, {7, 9, 250}, {70, 4, 100}, {33, 150, 40}};
    for (const auto& [M, N, K] : shapes) {
        const Weight w(N, K);
        std::vector<float> x = normal_values(M * K);
        x[static_cast<size_t>(M * K - 1)] = 20.0f;
        x[0] = 6.0f;  // exactly the threshold: an outlier
        for (const double threshold : {0.0, 6.0, 0.001}) {
            for (const int64_t rule : {HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH}) {
                const std::vector<float> out = run8(w, x.data(), M, threshold, rule, any_of({1, 3}));
                for (int64_t m = 0; m < M; ++m) {
                    for (int64_t n = 0; n < N; ++n) {
                        const double want = expected(w, x, M, m, n, threshold, rule == HB_OUTLIERS_BATCH);
                        const double error = std::fabs(out[static_cast<size_t>(m * N + n)] - want);
                        EXPECT(error <= 2e-5 * (1.0 + std::fabs(want)), "out[%d, %d] %g off by %g", (int)m, (int)n,
                               want, error);
                    }
                }
            }
        }
    }
}

namespace {

double value_at(const std::vector<float>& values, int64_t index) {
    return values[static_cast<size_t>(index)];
}

double value_at(const std::vector<uint16_t>& values, int64_t index) {
    return testing::value_at(values, index, HB_BFLOAT16);
}

// T: float, or uint16_t for bfloat16; its results are rounded by up to `rounding` of their size.
template <typename T>
void weights_alone_follow_their_definition(const std::vector<T>& x, int64_t M, int64_t N, int64_t K, int64_t threads,
                                           double rounding) {
    const Weight w(N, K);
    const auto threshold = static_cast<double>(any_of({0, 6}));
    const std::vector<T> out = run8(w, x.data(), M, threshold, HB_OUTLIERS_ALL, threads);
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double want = 0, size = 0;
            for (int64_t k = 0; k < K; ++k) {
                const double product = value_at(x, m * K + k) * w.codes[static_cast<size_t>(n * K + k)] *
                                       w.absmax[static_cast<size_t>(n)] / 127.0;
                want += product, size += std::fabs(product);
            }
            const double error = std::fabs(value_at(out, m * N + n) - want);
            EXPECT(error <= std::fabs(want) * rounding + 1e-6 * size, "out[%d, %d] %g off by %g", (int)m, (int)n, want,
                   error);
        }
    }
}

}  // namespace

TEST(weights_alone_in_int8_follow_their_definition) {
    const int64_t shapes[][3] = {{1, 1, 1}, {1, 3, 64}, {2, 5, 33}, {7, 9, 256}, {300, 4, 100}};
    for (const auto& [M, N, K] : shapes) {
        weights_alone_follow_their_definition(normal_values(M * K), M, N, K, any_of({1, 3}), 0);
    }
}

TEST(weights_alone_in_int8_with_bfloat16_follow_their_definition) {
    const int64_t shapes[][3] = {{1, 1, 1}, {1, 3, 64}, {17, 33, 577}, {33, 150, 1030}, {270, 4, 100}};
    for (const auto& [M, N, K] : shapes) {
        weights_alone_follow_their_definition(bfloats(normal_values(M * K)), M, N, K, M > 100 ? 3 : 1, 1.0 / 256);
    }
}

TEST(long_rows_are_multiplied_stretch_by_stretch_with_the_same_bits) {
    const int64_t M = 33, N = 37, K = 6200;
    const Weight w(N, K);
    std::vector<float> x = normal_values(M * K);
    x[static_cast<size_t>(20 * K + 5000)] = 20.0f;
    const auto run = [&](const float* rows, int64_t count) {
        return run8(w, rows, count, 6.0, HB_OUTLIERS_VALUE, any_of({1, 3}));
    };
    const std::vector<float> together = run(x.data(), M);
    for (int64_t m = 0; m < M; ++m) {
        const std::vector<float> alone = run(x.data() + m * K, 1);
        EXPECT(memcmp(alone.data(), together.data() + m * N, alone.size() * sizeof(float)) == 0, "row %d", (int)m);
        const double want = expected(w, x, M, m, N - 1, 6.0, false);
        EXPECT(std::fabs(alone.back() - want) <= 2e-5 * (1.0 + std::fabs(want)), "%g, not %g", alone.back(), want);
    }
}

TEST(long_rows_do_not_overflow) {
    const int64_t K = 300000;  // 127 * 127 * K is beyond an int32
    std::vector<int8_t> codes(static_cast<size_t>(K), 127);
    std::vector<float> x(static_cast<size_t>(K), 2.0f);
    const float absmax = 3.0f;
    float out = 0;
    auto args = args_with<hb_linear8_args>();
    args.x = x.data(), args.M = 1, args.N = 1, args.K = K, args.codes = codes.data(), args.absmax = &absmax;
    args.out = &out;
    int64_t bytes = -1;
    EXPECT(hb_linear8_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(hb_linear8(&args) == HB_OK, "K %d", (int)K);
    EXPECT(std::fabs(out - 6.0 * K) < 1.0, "%g", static_cast<double>(out));
}

TEST(int8_dequantizes_in_float32) {
    const Weight w(6, 77);
    std::vector<float> out = poisoned<float>(w.N * w.K);
    auto args = args_with<hb_dequantize8_args>();
    args.codes = w.codes.data(), args.absmax = w.absmax.data(), args.N = w.N, args.K = w.K, args.out = out.data();
    EXPECT(hb_dequantize8(&args) == HB_OK, "dequantize");
    for (size_t i = 0; i < out.size(); ++i) {
        const float product = static_cast<float>(w.codes[i]) * w.absmax[i / 77];
        EXPECT(out[i] == product / 127.0f, "value %d", (int)i);
    }
}

TEST(weights_beyond_float16_keep_their_value) {
    std::vector<float> w = {1e6f, -2.0f, 65504.0f, 0.0f};
    std::vector<int8_t> codes = poisoned<int8_t>(4);
    float absmax = 0;
    auto args = args_with<hb_quantize8_args>();
    args.w = w.data(), args.N = 1, args.K = 4, args.codes = codes.data(), args.absmax = &absmax;
    EXPECT(hb_quantize8(&args) == HB_OK, "quantize");
    EXPECT(absmax == 1e6f && codes[0] == 127 && codes[2] == 8, "%g %d %d", static_cast<double>(absmax), codes[0],
           codes[2]);
}
