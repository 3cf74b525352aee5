// How the matmuls of the CUDA library cut their work on tensor cores: plain host code, which needs no GPU.
#include "cuda/linear4_hopper.h"
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

// Of float32 sums: slices are those of one row, and apart only where tiles leave as much of the device idle as they
// may.
template <int Count>
void expect_float_cut(const hb::MatmulPlan& plan, const hb::MatmulTile (&tiles)[Count], const hb::MatmulPlan& alone,
                      int64_t M, int64_t N, int64_t K) {
    expect_cut(plan, tiles, M, N, K);
    EXPECT(alone.slice_values == plan.slice_values, "slices of %d rows and of one", (int)M);
    const hb::MatmulTile& tile = tiles[plan.tile];
    const int64_t at_once = hb::kMultiprocessors * tile.beside;
    const int64_t most = tile.tokens <= hb::kFewTokens ? at_once : at_once / 2;
    EXPECT(!plan.apart || plan.tiles <= most, "%d tiles for %d x %d x %d", (int)plan.tiles, (int)M, (int)N, (int)K);
    EXPECT(plan.workspace_bytes(M, N) <= plan.slices * most * tile.rows * tile.tokens * 4, "%d x %d", (int)M, (int)N);
}

void expect_hopper_cut(int64_t M, int64_t N, int64_t K) {
    const hb::HopperPlan plan = hb::plan_hopper(M, N, K);
    expect_float_cut(plan.cut, hb::kTilesOfHopper, hb::plan_hopper(1, N, K).cut, M, N, K);
    EXPECT(plan.slice_bytes == plan.cut.workspace_bytes(M, N), "%d x %d", (int)M, (int)N);
}

}  // namespace

TEST(plans_cover_the_output_and_k) {
    for (int i = 0; i < 2000; ++i) {
        const int64_t M = any_size(10000), N = any_size(100000), K = any_of({0, any_size(400000)});
        const hb::MatmulPlan floats = hb::plan_int8_weights(M, N, K);
        expect_float_cut(floats, hb::kTilesOfInt8Weights, hb::plan_int8_weights(1, N, K), M, N, K);
        hb_linear4_args args = {};
        args.M = M, args.N = N, args.K = K, args.blocksize = any_of({32, 64});
        hb_linear4_args alone = args;
        alone.M = 1;
        const auto& tiles = args.blocksize == 32 ? hb::kSmallTilesOf4Bits : hb::kTilesOf4Bits;
        expect_float_cut(hb::plan_linear4(args), tiles, hb::plan_linear4(alone), M, N, K);
        expect_hopper_cut(M, N, K);
    }
}

// The sizes of a model's layers.
TEST(slices_apart_take_no_more_than_half_a_device_of_wide_tiles) {
    for (const int64_t N : {1024, 4096, 6144, 14336, 28672}) {
        for (const int64_t K : {1024, 4096, 14336}) {
            for (int64_t M = 1; M <= 4096; M *= 2) expect_hopper_cut(M, N, K);
        }
    }
    const int64_t largest = 8 * (hb::kMultiprocessors / 2) * hb::kHopperRows * 128 * 4;
    for (int64_t M = 1; M <= 8192; ++M) {
        const int64_t image = hb::round_up(M < 2048 ? M : 2048, 128) * 4096 * 2;
        EXPECT(hb::hopper_workspace_bytes(M, 4096, 4096) <= image + largest, "%d rows", (int)M);
    }
}

TEST(slices_are_apart_where_the_device_is_idle_and_not_where_it_is_full) {
    for (const int64_t M : {1, 8, 16, 32, 64}) EXPECT(hb::plan_hopper(M, 4096, 4096).cut.apart, "%d rows", (int)M);
    for (const int64_t M : {512, 1024, 2048}) {
        EXPECT(hb::plan_hopper(M, 4096, 4096).slice_bytes == 0, "%d rows", (int)M);
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
