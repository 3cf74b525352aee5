// The 4-bit matmul against float64, on odd shapes, with exact-size buffers and a workspace full of NaNs.
#include <algorithm>

#include "weight4.h"

using namespace testing;

namespace {

template <typename T>
std::vector<T> run(const Weight& w, const std::vector<T>& x, int64_t M, const std::vector<float>* bias, int64_t threads,
                   int64_t batch_invariant = 1) {
    return run_linear4({hb_linear4_workspace, hb_linear4}, w, x, M, bias, threads, batch_invariant);
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

TEST(products_of_bfloat16_are_right_at_every_shape) {
    const int64_t shapes[][3] = {{1, 1, 1},     {1, 16, 64},   {2, 3, 5},      {3, 17, 33},
                                 {16, 15, 512}, {17, 33, 577}, {31, 32, 2048}, {33, 130, 70},
                                 {9, 40, 256},  {300, 20, 70}, {33, 130, 1088}};
    for (const auto& [M, N, K] : shapes) {
        for (const int64_t blocksize : {32, 64, 1024}) {
            const Weight w(N, K, any_of({0, 1}) == 1, blocksize);
            const std::vector<uint16_t> x = bfloats(normal_values(M * K));
            const std::vector<float> bias = normal_values(N);
            const std::vector<uint16_t> out = run(w, x, M, &bias, 1);
            EXPECT(run(w, x, M, &bias, 3) == out, "%d x %d x %d on three threads", (int)M, (int)N, (int)K);
            for (int64_t n = 0; n < N; ++n) {
                std::vector<double> weights;
                for (int64_t k = 0; k < K; ++k) {
                    const double value = w.at(n, k);
                    weights.push_back(multiplies_bfloat16() ? value_of(bfloat(static_cast<float>(value)), 7) : value);
                }
                for (int64_t m = 0; m < M; ++m) {
                    double sum = bias[static_cast<size_t>(n)], size = std::fabs(sum);
                    for (int64_t k = 0; k < K; ++k) {
                        const double product = value_at(x, m * K + k, HB_BFLOAT16) * weights[static_cast<size_t>(k)];
                        sum += product, size += std::fabs(product);
                    }
                    const double error = std::fabs(value_at(out, m * N + n, HB_BFLOAT16) - sum);
                    const double rounded =
                        std::fabs(sum) / 256 + (multiplies_in_fixed_point() ? size / 4096 : 1e-6 * size);
                    EXPECT(error <= rounded, "out[%d, %d] of %d x %d x %d off by %g of %g", (int)m, (int)n, (int)M,
                           (int)N, (int)K, error, size);
                }
            }
        }
    }
}

// Where not every batch must give a row the same bits, sums may be scaled and not the table, which is then rounded
// once.
static void expect_near(const Weight& w, const std::vector<uint16_t>& x, int64_t M, const std::vector<float>& bias,
                        const std::vector<uint16_t>& out) {
    for (int64_t n = 0; n < w.N; ++n) {
        std::vector<double> weights;
        for (int64_t k = 0; k < w.K; ++k) weights.push_back(w.at(n, k));
        for (int64_t m = 0; m < M; ++m) {
            double sum = bias[static_cast<size_t>(n)], size = std::fabs(sum);
            for (int64_t k = 0; k < w.K; ++k) {
                const double product = value_at(x, m * w.K + k, HB_BFLOAT16) * weights[static_cast<size_t>(k)];
                sum += product, size += std::fabs(product);
            }
            const double error = std::fabs(value_at(out, m * w.N + n, HB_BFLOAT16) - sum);
            EXPECT(error <= std::fabs(sum) / 256 + size / 256, "out[%d, %d] of %d x %d x %d off by %g of %g", (int)m,
                   (int)n, (int)M, (int)w.N, (int)w.K, error, size);
        }
    }
}

// More than twelve rows may have bits of their own, but then all of them have these.
TEST(many_rows_of_bfloat16_are_right_too) {
    for (const int64_t N : {1, 16, 31, 33, 70}) {
        const int64_t shapes[][2] = {{64, 64},    {96, 32},     {768, 256}, {1088, 64},
                                     {1536, 512}, {2048, 1024}, {333, 64},  {576, 128}};
        for (const auto& [K, blocksize] : shapes) {
            const Weight w(N, K, any_of({0, 1}) == 1, blocksize);
            const std::vector<uint16_t> x = bfloats(normal_values(37 * K));
            const std::vector<float> bias = normal_values(N);
            const std::vector<uint16_t> out = run(w, x, 37, &bias, 3, 0);
            expect_near(w, x, 37, bias, out);
            for (const int64_t M : {13, 14, 24}) {
                const std::vector<uint16_t> fewer(x.begin(), x.begin() + M * K);
                const std::vector<uint16_t> some = run(w, fewer, M, &bias, any_of({1, 2}), 0);
                EXPECT(std::equal(some.begin(), some.end(), out.begin()), "%d rows of %d x %d", (int)M, (int)N, (int)K);
            }
        }
    }
}

TEST(few_rows_of_bfloat16_are_right_too) {
    for (const int64_t K : {64, 512, 2048}) {
        for (const int64_t blocksize : {64, 256}) {
            const Weight w(37, K, any_of({0, 1}) == 1, blocksize);
            const std::vector<uint16_t> x = bfloats(normal_values(5 * K));
            const std::vector<uint16_t> three(x.begin(), x.begin() + 3 * K), one(x.begin(), x.begin() + K);
            const std::vector<uint16_t> out = run(w, three, 3, nullptr, 2, 0), alone = run(w, one, 1, nullptr, 1, 0);
            EXPECT(std::equal(alone.begin(), alone.end(), out.begin()), "a row among few, K %d", (int)K);
            EXPECT(run(w, x, 5, nullptr, 1, 0) == run(w, x, 5, nullptr, 2, 1), "more rows are added up one way");
            expect_near(w, three, 3, std::vector<float>(37), out);
        }
    }
}

TEST(a_row_of_bfloat16_is_the_same_in_every_batch) {
    // Rows that lie in one piece of work and in several, blocks that are less than a piece and more.
    const int64_t shapes[][2] = {{333, 64}, {1024, 64}, {2112, 64}, {5632, 256}, {8192, 4096}};
    for (const auto& [K, blocksize] : shapes) {
        const Weight w(37, K, any_of({0, 1}) == 1, blocksize);
        const std::vector<uint16_t> x = bfloats(normal_values(40 * w.K));
        const std::vector<uint16_t> together = run(w, x, 40, nullptr, 2);
        for (const int64_t M : {1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 32, 33, 39}) {
            const std::vector<uint16_t> fewer(x.begin(), x.begin() + M * w.K);
            const std::vector<uint16_t> out = run(w, fewer, M, nullptr, any_of({1, 2, 3}));
            EXPECT(memcmp(out.data(), together.data(), out.size() * sizeof(uint16_t)) == 0, "M = %d", (int)M);
        }
    }
}

template <typename T>
static void compare_group(const std::vector<T>& x, int64_t M, int64_t K, int64_t batch_invariant) {
    const std::vector<float> bias = normal_values(130);
    // Block sizes that differ, and one of more than a row.
    const Weight weights[] = {{70, K, true}, {1, K, false}, {130, K, true}, {0, K, false}, {37, K, true, 512}};
    for (const int64_t threads : {1, 3}) {
        std::vector<std::vector<T>> outs;
        std::vector<hb_linear4_args> items;
        for (const Weight& w : weights) {
            outs.push_back(poisoned<T>(M * w.N));
            const std::vector<float>* const own_bias = w.N == 130 ? &bias : nullptr;
            items.push_back(linear4_arguments(w, x, M, own_bias, outs.back(), threads, batch_invariant));
        }
        int64_t bytes = -1;
        const int64_t count = static_cast<int64_t>(items.size());
        EXPECT(hb_linear4_group_workspace(items.data(), count, &bytes) == HB_OK, "workspace");
        const Workspace workspace(bytes);
        workspace.give_to(items[0].call);
        EXPECT(hb_linear4_group(items.data(), count) == HB_OK, "group");
        for (size_t i = 0; i < items.size(); ++i) {
            const std::vector<float>* const own_bias = weights[i].N == 130 ? &bias : nullptr;
            const std::vector<T> alone = run(weights[i], x, M, own_bias, 2, batch_invariant);
            EXPECT(outs[i] == alone, "item %d", (int)i);
        }
        --items[0].call.workspace_bytes;
        EXPECT(hb_linear4_group(items.data(), count) == HB_WORKSPACE_TOO_SMALL, "a byte less");
    }
}

TEST(a_group_gives_what_its_products_give_alone) {
    compare_group(bfloats(normal_values(300 * 256)), 300, 256, 0);  // in two passes
    const std::vector<float> x = normal_values(40 * 256);
    compare_group(x, 40, 256, 1);
    compare_group(std::vector<float>(x.begin(), x.begin() + 7 * 256), 7, 256, 1);
    for (const int64_t batch_invariant : {0, 1}) {
        compare_group(bfloats(x), 40, 256, batch_invariant);
        compare_group(bfloats(x), 12, 256, batch_invariant);
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
    const std::vector<float> out = run(w, std::vector<float>(), 2, &bias, 1);
    for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i] == bias[i % 5], "out %d", (int)i);
    const std::vector<uint16_t> rounded = run(w, std::vector<uint16_t>(), 2, &bias, 1);
    for (size_t i = 0; i < rounded.size(); ++i) EXPECT(rounded[i] == bfloat(bias[i % 5]), "out %d", (int)i);
}
