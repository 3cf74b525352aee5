// The 4-bit matmul of rows with the matrices of their experts on tensor cores: what linear4_mma.cu does for one weight,
// whose bits it has. A thread block finds on the device which rows it works for (experts.cuh), and goes over all of K.
#include "linear4_experts.cuh"
#include "linear4_tile.cuh"

namespace hb {

namespace {

// A matrix of the expert whose rows `tile` has, on these rows alone.
template <typename T>
__device__ Problem4 problem_of(const Problem4& all, const Experts4& experts, const ExpertTile& tile, int64_t matrix) {
    const int64_t number = tile.expert * experts.matrices + matrix;
    Problem4 own = all;
    own.x = all.x.from(tile.first, tile.rows);
    own.outputs = all.outputs.template of_expert<T>(tile, number, matrix * all.outputs.N);
    own.codes = all.codes.behind(number * experts.packed_bytes, all.outputs.N);
    own.scales.absmax = experts.absmax_of(all.scales.absmax, number);
    return own;
}

// Neighbouring blocks have the same rows of W of neighbouring tiles, which often are one expert's.
template <typename T, int WeightRows, int Tokens, int Stages, int Scaled>
__global__ void __launch_bounds__(kMmaThreads) linear4_experts_mma(Problem4 all, Experts4 experts) {
    using Tile = Linear4Tile<T, WeightRows, Tokens, Stages, Scaled>;
    const int64_t row_tiles = (all.outputs.N + Tile::kRows - 1) / Tile::kRows;
    const int64_t matrix = blockIdx.x / all.token_tiles / row_tiles;
    const int64_t first_row = blockIdx.x / all.token_tiles % row_tiles * Tile::kRows;
    const ExpertTile found = find_expert_tile(experts.rows, Tile::kTokens, blockIdx.x % all.token_tiles);
    if (found.rows == 0) return;
    const Problem4 p = problem_of<T>(all, experts, found, matrix);
    if (found.expert == experts.rows.count) {
        p.outputs.template clear<T>(first_row, Tile::kRows);
        return;
    }
    Tile tile(p, first_row, 0);
    tile.fill_tables();
    tile.multiply(0, p.K);
    tile.write(0);
}

template <typename T, int Scaled>
void launch_scaled(const hb_linear4_experts_args& a, const ExpertsPlan& plan, const Problem4& problem) {
    with_number<count_of(kSmallTilesOf4Bits)>(plan.tile, [&](auto number) {
        constexpr MatmulTile tile = kSmallTilesOf4Bits[decltype(number)::value];
        constexpr int bytes = Linear4Tile<T, tile.rows, tile.tokens, tile.stages, Scaled>::kSharedBytes;
        launch(linear4_experts_mma<T, tile.rows, tile.tokens, tile.stages, Scaled>, plan.blocks(a.P), kMmaThreads,
               bytes, stream_of(a.call), problem, Experts4(a));
    });
}

template <typename T>
void launch_dtype(const hb_linear4_experts_args& a, const ExpertsPlan& plan) {
    const Problem4 problem(a, plan, a.P * a.N, nullptr);
    if (has_small_blocks(a)) {
        launch_scaled<T, 32>(a, plan, problem);
    } else {
        launch_scaled<T, 64>(a, plan, problem);
    }
}

}  // namespace

void launch_linear4_experts_mma(const hb_linear4_experts_args& a) {
    const ExpertsPlan plan = plan_experts(kSmallTilesOf4Bits, a.M, a.E, a.N, a.K);
    if (a.x_dtype == HB_FLOAT16) {
        launch_dtype<__half>(a, plan);
    } else {
        launch_dtype<__nv_bfloat16>(a, plan);
    }
}

}  // namespace hb
