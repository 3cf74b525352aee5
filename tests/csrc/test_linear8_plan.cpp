// How the 8-bit matmuls of the CUDA library cut their work on tensor cores: plain host code, which needs no GPU.
#include "cuda/linear8_plan.h"
#include "testing.h"

using namespace testing;

namespace {

int64_t any_size(int64_t largest) {
    const int64_t near = any_of({1, 2, 7, 8, 9, 64, 65, 4096, largest});
    return any_of({near, std::uniform_int_distribution<int64_t>(1, largest)(generator)});
}

template <int Count>
void expect_cut(const hb::MatmulPlan& plan, const hb::MatmulTile (&tiles)[Count], int64_t M, int64_t N, int64_t K) {
    const bool known = plan.tile >= 0 && plan.tile < Count;
    EXPECT(known, "%d", plan.tile);
    if (!known) return;
    const hb::MatmulTile& tile = tiles[plan.tile];
    EXPECT(M <= tile.tokens || plan.tile + 1 == Count, "%d rows in %d", (int)M, tile.tokens);
    for (const hb::MatmulTile& other : tiles) {
        EXPECT(other.tokens >= tile.tokens || M > other.tokens, "%d rows fit %d", (int)M, other.tokens);
    }
    EXPECT(plan.token_tiles * tile.tokens >= M, "M %d", (int)M);
    EXPECT(plan.tiles % plan.token_tiles == 0 && plan.tiles / plan.token_tiles * tile.rows >= N, "N %d", (int)N);
    EXPECT(plan.slice_values > 0 && plan.slice_values % tile.stage_values == 0, "%d", (int)plan.slice_values);
    EXPECT(plan.slices * plan.slice_values >= K && (plan.slices - 1) * plan.slice_values < (K == 0 ? 1 : K),
           "%d slices of %d for %d", (int)plan.slices, (int)plan.slice_values, (int)K);
    EXPECT(plan.apart || plan.workspace_bytes(M, N) == 0, "nothing goes there");
    EXPECT(!plan.apart || plan.workspace_bytes(M, N) == plan.slices * M * N * 4, "%d x %d", (int)M, (int)N);
}

}  // namespace

TEST(plans_cover_the_output_and_k) {
    for (int i = 0; i < 2000; ++i) {
        const int64_t M = any_size(10000), N = any_size(100000), K = any_of({0, any_size(400000)});
        const hb::MatmulPlan floats = hb::plan_int8_weights(M, N, K);
        expect_cut(floats, hb::kTilesOfInt8Weights, M, N, K);
        const hb::MatmulPlan alone = hb::plan_int8_weights(1, N, K);
        EXPECT(alone.slice_values == floats.slice_values, "slices of %d rows and of one", (int)M);
        EXPECT(!floats.apart || floats.tiles < hb::kEnoughBlocks, "%d tiles are enough", (int)floats.tiles);
    }
}

TEST(sums_of_a_slice_fit_an_int32) {
    EXPECT(hb::kExactTerms * 127 * 128 <= INT32_MAX, "%d", (int)hb::kExactTerms);
    for (int i = 0; i < 2000; ++i) {
        const int64_t M = any_size(10000), N = any_size(100000), K = any_of({0, any_size(3000000)});
        const hb::MatmulPlan plan = hb::plan_int8_products(M, N, K);
        expect_cut(plan, hb::kTilesOfInt8, M, N, K);
        EXPECT(plan.slice_values <= hb::kExactTerms, "%d for %d x %d x %d", (int)plan.slice_values, (int)M, (int)N,
               (int)K);
        EXPECT(plan.apart == (plan.slices > 1), "%d slices", (int)plan.slices);
    }
}
