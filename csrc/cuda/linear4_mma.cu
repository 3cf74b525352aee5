// out = x * W^T + bias with W in 4 bits, on tensor cores (sm_80 and later): x in 16 bits, K a multiple of 64. What a
// thread block does is in linear4_tile.cuh.
//
// Promises: a row's result does not depend on M (slices.h), nor on how x is aligned; the same bits every time.
#include "linear4_tile.cuh"

namespace hb {

namespace {

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache.
template <typename T, int WeightRows, int Tokens, int Stages, int Scaled>
__global__ void __launch_bounds__(kMmaThreads) linear4_mma(Problem4 p) {
    using Tile = Linear4Tile<T, WeightRows, Tokens, Stages, Scaled>;
    const int64_t number = blockIdx.x % p.tiles;
    const int64_t slice = blockIdx.x / p.tiles;
    Tile tile(p, number / p.token_tiles * Tile::kRows, number % p.token_tiles * Tile::kTokens);
    tile.fill_tables();
    const int64_t begin = slice * p.slice_values;
    const int64_t slice_end = begin + p.slice_values;
    tile.multiply(begin, p.outputs.slices != nullptr && slice_end < p.K ? slice_end : p.K);
    tile.write(slice);
}

template <typename T, int Scaled>
void launch_scaled(const Problem4& problem, const MatmulPlan& plan, cudaStream_t stream) {
    static_assert(count_of(kSmallTilesOf4Bits) == count_of(kTilesOf4Bits), "a plan's tile has the same number in both");
    with_number<count_of(kTilesOf4Bits)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        constexpr MatmulTile tile = Scaled < kChunkValues ? kSmallTilesOf4Bits[which] : kTilesOf4Bits[which];
        constexpr int bytes = Linear4Tile<T, tile.rows, tile.tokens, tile.stages, Scaled>::kSharedBytes;
        launch(linear4_mma<T, tile.rows, tile.tokens, tile.stages, Scaled>, plan.blocks(), kMmaThreads, bytes, stream,
               problem);
    });
}

template <typename T>
void launch_dtype(const Problem4& problem, const MatmulPlan& plan, bool small_blocks, cudaStream_t stream) {
    if (small_blocks) {
        launch_scaled<T, 32>(problem, plan, stream);
    } else {
        launch_scaled<T, 64>(problem, plan, stream);
    }
    if (!plan.apart) return;
    launch(add_slices<T>, blocks_for_adding(problem.outputs.M * problem.outputs.N), kAddingThreads, 0, stream,
           problem.outputs, plan.slices);
}

}  // namespace

void launch_linear4_mma(const hb_linear4_args& a, const MatmulPlan& plan) {
    Problem4 problem(a, plan, a.N, plan.apart ? static_cast<float*>(a.call.workspace) : nullptr);
    problem.tiles = plan.tiles;
    if (a.x_dtype == HB_FLOAT16) {
        launch_dtype<__half>(problem, plan, has_small_blocks(a), stream_of(a.call));
    } else {
        launch_dtype<__nv_bfloat16>(problem, plan, has_small_blocks(a), stream_of(a.call));
    }
}

}  // namespace hb
