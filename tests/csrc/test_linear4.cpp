// The 4-bit matmul against float64, on odd shapes, with exact-size buffers and a workspace full of NaNs.
#include "weight4.h"

using namespace testing;

namespace {

std::vector<float> run(const Weight& w, const std::vector<float>& x, int64_t M, const std::vector<float>* bias,
                       int64_t threads) {
    return run_linear4({hb_linear4_workspace, hb_linear4}, w, x, M, bias, threads);
}

}  // namespace

TEST(products_are_right_at_every_shape) {
    const int64_t shapes[][3] = {{1, 1, 1},   {1, 1, 64},  {2, 3, 5},    {3, 7, 33},    {5, 9, 129},
                                 {9, 5, 300}, {4, 4, 256}, {1, 130, 64}, {17, 3, 1000}, {300, 5, 19}};
    for (const auto& [M, N, K] : shapes) {
        for (const bool nested : {false, true}) {
            const Weight w(N, K, nested);
            const std::vector<float> x = normal_values(M * K);
            const std::vector<float> bias = normal_values(N);
            for (const int64_t threads : {1, 3}) {
                const std::vector<float> out = run(w, x, M, &bias, threads);
                for (int64_t m = 0; m < M; ++m) {
                    for (int64_t n = 0; n < N; ++n) {
                        double sum = bias[static_cast<size_t>(n)], size = std::fabs(sum);
                        for (int64_t k = 0; k < K; ++k) {
                            const double product = x[static_cast<size_t>(m * K + k)] * w.at(n, k);
                            sum += product, size += std::fabs(product);
                        }
                        const double error = std::fabs(out[static_cast<size_t>(m * N + n)] - sum);
                        EXPECT(error <= 1e-6 * size, "out[%d, %d] of %d x %d x %d off by %g of %g", (int)m, (int)n,
                               (int)M, (int)N, (int)K, error, size);
                    }
                }
            }
        }
    }
}

TEST(a_row_is_the_same_in_every_batch) {
    const Weight w(37, 333, true);
    const std::vector<float> x = normal_values(9 * w.K);
    const std::vector<float> together = run(w, x, 9, nullptr, 2);
    for (int64_t M = 1; M <= 9; ++M) {
        const std::vector<float> fewer(x.begin(), x.begin() + M * w.K);
        const std::vector<float> out = run(w, fewer, M, nullptr, any_of({1, 2, 3}));
        EXPECT(memcmp(out.data(), together.data(), out.size() * sizeof(float)) == 0, "M = %d", (int)M);
    }
}

TEST(no_input_features_give_the_bias) {
    Weight w(5, 0, false);
    const std::vector<float> bias = normal_values(5);
    const std::vector<float> out = run(w, {}, 2, &bias, 1);
    for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i] == bias[i % 5], "out %d", (int)i);
}
