// The 4-bit matmul of rows with the matrices of their experts: the entry, and the kernel for what
// linear4_experts_mma.cu does not take, float32 and any K. Which rows are whose is found on the device (experts.cuh);
// nothing is waited for and there is no workspace, so that a graph can hold the call.
//
// Both kernels add up as those of hb_linear4 do and have their bits; Hopper's has no counterpart here.
#include "linear4_experts.cuh"
#include "linear4_mma.h"
#include "linear4_warp.cuh"

namespace hb {

namespace {

// A warp makes the outputs of one weight row for one tile of an expert's rows.
template <typename T>
__global__ void linear4_experts(const T* x, int64_t N, int64_t K, WarpWeight first, Experts4 experts,
                                int64_t token_tiles, const void* bias, int64_t bias_dtype, T* out) {
    const int64_t columns = experts.matrices * N;
    for (int64_t task = warp_index(); task < columns * token_tiles; task += warp_count()) {
        const int64_t column = task % columns, matrix = column / N;
        const ExpertTile tile = find_expert_tile(experts.rows, kWarpRows, task / columns);
        T* const to = out + tile.first * columns + column;
        if (tile.rows == 0) continue;
        if (tile.expert == experts.rows.count) {
            if (lane() < tile.rows) to[lane() * columns] = from_float<T>(0.0f);
            continue;
        }
        const int64_t number = tile.expert * experts.matrices + matrix;
        WarpWeight weight = first;
        weight.packed += number * experts.packed_bytes;
        weight.absmax = experts.absmax_of(first.absmax, number);
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, tile.expert * columns + column);
        multiply_weight_row(x + tile.first * K, tile.rows, K, weight, column % N, add, to, columns);
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear4_experts_workspace(const hb_linear4_experts_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_experts_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = 0;
    return HB_OK;
}

extern "C" hb_status hb_linear4_experts(const hb_linear4_experts_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_experts_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const bool are_aligned = reinterpret_cast<uintptr_t>(a.packed) % 16 == 0 && a.packed_bytes % 16 == 0;
    if (mma_takes(a) && are_aligned) {
        launch_linear4_experts_mma(a);
        return launched();
    }
    const WarpWeight first = {
        a.packed, a.format, a.blocksize, {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize}};
    const int64_t token_tiles = most_expert_tiles(a.M, a.E, kWarpRows);
    const unsigned blocks = blocks_for_warps(a.P * a.N * token_tiles);
    with_dtype(a.x_dtype, [&](auto type) {
        using T = decltype(type);
        launch(linear4_experts<T>, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const T*>(a.x),
               a.N, a.K, first, Experts4(a), token_tiles, a.bias, a.bias_dtype, static_cast<T*>(a.out));
    });
    return launched();
}
