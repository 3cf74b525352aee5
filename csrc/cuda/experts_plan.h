// How the rows of experts are cut into tiles, which are known only on the device. Plain host code; experts.cuh finds
// them there.
#pragma once

#include "matmul_plan.h"

namespace hb {

// The most tiles of up to `tile_rows` rows that M rows of `experts` experts and of nobody can be cut into, each one's
// by themselves.
inline int64_t most_expert_tiles(int64_t M, int64_t experts, int64_t tile_rows) {
    const int64_t owners = experts + 1 < M ? experts + 1 : M;
    return (M + owners * (tile_rows - 1)) / tile_rows;
}

// Thread blocks go over all of K, in the slices that one weight's sums have: every active expert brings blocks of its
// own.
struct ExpertsPlan {
    int tile;             // its number in the kernel's table
    int64_t token_tiles;  // at most
    int64_t row_tiles;    // of a matrix
    int64_t slice_values;

    unsigned blocks(int64_t matrices) const { return static_cast<unsigned>(token_tiles * row_tiles * matrices); }
};

// Tiles are for twice the rows that an expert has on average.
template <int Count>
ExpertsPlan plan_experts(const MatmulTile (&tiles)[Count], int64_t M, int64_t E, int64_t N, int64_t K) {
    ExpertsPlan plan = {};
    plan.tile = tile_for(tiles, 2 * ceil_div(M, E < 1 ? 1 : E));
    plan.token_tiles = most_expert_tiles(M, E, tiles[plan.tile].tokens);
    plan.row_tiles = ceil_div(N, tiles[plan.tile].rows);
    plan.slice_values = cut_for_few_rows(kSmallestWeightRows, N, K).steps * kSliceStep;
    return plan;
}

}  // namespace hb
