// The 4-bit matmul with int8 activations against its definition, bit for bit, and against float64.
#include <algorithm>

#include "weight4.h"

using namespace testing;

namespace {

constexpr int64_t kGroup = 64;

std::vector<float> run(const Weight& w, const std::vector<float>& x, int64_t M, const std::vector<float>* bias,
                       int64_t threads) {
    return run_linear4({hb_linear4_int8_workspace, hb_linear4_int8}, w, x, M, bias, threads);
}

// A row of x as int8 codes, and the largest magnitude of each group.
struct Rounded {
    std::vector<int> codes;
    std::vector<float> largest;

    Rounded(const float* x, int64_t K) {
        for (int64_t begin = 0; begin < K; begin += kGroup) {
            const int64_t end = std::min(begin + kGroup, K);
            float most = 0;
            for (int64_t k = begin; k < end; ++k) {
                const float magnitude = std::fabs(x[k]);
                if (std::isnan(magnitude) || magnitude > most) most = magnitude;
                if (std::isnan(most)) break;
            }
            largest.push_back(most);
            const float factor = (1.0f / most) * 127.0f;
            for (int64_t k = begin; k < end; ++k) {
                const float scaled = x[k] * (std::isfinite(factor) ? factor : 0.0f);
                codes.push_back(std::isfinite(scaled) ? static_cast<int>(std::nearbyint(scaled)) : 0);
            }
        }
    }
};

float defined(const Weight& w, const Rounded& x, int64_t n) {
    static const std::vector<float> tables[] = {table(HB_TABLE_NF4_INT8), table(HB_TABLE_FP4_INT8)};
    static const std::vector<float> steps = table(HB_TABLE_INT8_STEPS);
    float total = 0;
    for (int64_t k = 0; k < w.K;) {
        const int64_t group = k / kGroup, block = (n * w.K + k) / w.blocksize;
        int64_t sum = 0;
        for (; k < w.K && k / kGroup == group && (n * w.K + k) / w.blocksize == block; ++k) {
            sum += x.codes[static_cast<size_t>(k)] * static_cast<int>(tables[w.format][w.code(n, k)]);
        }
        const float scale = x.largest[static_cast<size_t>(group)] * steps[static_cast<size_t>(w.format)];
        const float factor = w.absmax[static_cast<size_t>(block)] * scale;
        total += static_cast<float>(sum) * factor;
    }
    return total;
}

void expect_defined(const Weight& w, const std::vector<float>& x, int64_t M, const std::vector<float>* bias) {
    const std::vector<float> out = run(w, x, M, bias, any_of({1, 2, 3}));
    for (int64_t m = 0; m < M; ++m) {
        const Rounded rounded(x.data() + m * w.K, w.K);
        for (int64_t n = 0; n < w.N; ++n) {
            float want = defined(w, rounded, n);
            if (bias != nullptr) want += (*bias)[static_cast<size_t>(n)];
            const float found = out[static_cast<size_t>(m * w.N + n)];
            EXPECT(found == want || (std::isnan(found) && std::isnan(want)), "[%d, %d] of %d x %d x %d: %g, not %g",
                   (int)m, (int)n, (int)M, (int)w.N, (int)w.K, found, want);
        }
    }
}

}  // namespace

TEST(int8_products_are_the_definition_bit_for_bit) {
    const int64_t shapes[][3] = {{1, 1, 1},    {1, 1, 64},   {2, 3, 5},      {3, 7, 33},    {5, 9, 129},   {9, 5, 300},
                                 {4, 4, 256},  {1, 130, 64}, {17, 3, 1000},  {300, 5, 19},  {1, 6, 320},   {3, 67, 192},
                                 {8, 21, 512}, {9, 64, 64},  {11, 67, 1280}, {23, 131, 64}, {300, 70, 256}};
    for (const auto& [M, N, K] : shapes) {
        for (const bool nested : {false, true}) {
            for (const int64_t blocksize : {64, 128, 1024}) {  // rows of whole blocks, among them of several groups
                if (blocksize != 64 && K % blocksize != 0) continue;
                const std::vector<float> bias = normal_values(N);
                expect_defined(Weight(N, K, nested, blocksize), normal_values(M * K), M, nested ? &bias : nullptr);
            }
            expect_defined(Weight(N, K, nested), normal_values(M * K), M, nullptr);
        }
    }
}

TEST(int8_groups_of_zeros_of_nothing_finite_and_of_tiny_values) {
    for (const int64_t K : {320, 330}) {
        for (const int64_t M : {1, 4, 9}) {
            std::vector<float> x = normal_values(M * K);
            for (int64_t k = 0; k < 64; ++k) x[static_cast<size_t>(k)] = 0;
            for (int64_t k = 64; k < 128; ++k) x[static_cast<size_t>(k)] *= 1e-39f;
            for (int64_t k = 128; k < 192; ++k) x[static_cast<size_t>(k)] *= 1e37f;
            if (M > 1) x[static_cast<size_t>(K + 70)] = std::nanf("");
            if (M > 4) x[static_cast<size_t>(3 * K + 319)] = -std::numeric_limits<float>::infinity();
            Weight w(19, K, false, 64);
            w.absmax[3] = std::numeric_limits<float>::infinity();
            w.absmax[8] = std::nanf("");
            expect_defined(w, x, M, nullptr);
            const std::vector<float> out = run(w, x, M, nullptr, 1);
            EXPECT(M == 1 || std::isnan(out[static_cast<size_t>(w.N + 18)]), "a NaN in x is seen");
            EXPECT(M <= 4 || std::isnan(out[static_cast<size_t>(3 * w.N + 18)]), "an infinity in x is seen");
            EXPECT(std::isfinite(out[18]), "and by no other row");
        }
    }
}

TEST(int8_products_are_near_float64) {
    for (const int64_t M : {1, 7, 40}) {
        const Weight w(70, 512, false, 64);
        const std::vector<float> x = normal_values(M * w.K);
        const std::vector<float> out = run(w, x, M, nullptr, 2);
        double squares = 0, errors = 0;
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t n = 0; n < w.N; ++n) {
                double sum = 0;
                for (int64_t k = 0; k < w.K; ++k) sum += x[static_cast<size_t>(m * w.K + k)] * w.at(n, k);
                squares += sum * sum;
                errors += std::pow(out[static_cast<size_t>(m * w.N + n)] - sum, 2);
            }
        }
        EXPECT(errors > 0 && std::sqrt(errors / squares) < 0.02, "%g", std::sqrt(errors / squares));
    }
}

TEST(int8_row_is_the_same_in_every_batch) {
    for (const int64_t K : {333, 384}) {
        const Weight w(77, K, true, 64);
        const std::vector<float> x = normal_values(260 * w.K);
        const std::vector<float> together = run(w, x, 260, nullptr, 2);
        for (int64_t M = 1; M <= 19; ++M) {
            const std::vector<float> fewer(x.begin(), x.begin() + M * w.K);
            const std::vector<float> out = run(w, fewer, M, nullptr, any_of({1, 2, 3}));
            EXPECT(memcmp(out.data(), together.data(), out.size() * sizeof(float)) == 0, "M = %d", (int)M);
        }
    }
}

TEST(int8_without_input_features_gives_the_bias) {
    const Weight w(5, 0, false);
    const std::vector<float> bias = normal_values(5);
    const std::vector<float> out = run(w, {}, 2, &bias, 1);
    for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i] == bias[i % 5], "out %d", (int)i);
}
