// Choosing how a matmul on tensor cores cuts its work: tiles of the output by M, sums over K in slices (slices.h).
// Plain host code; what tiles a kernel has stands in linear4_mma.h, linear4_hopper.h and linear8_plan.h.
#pragma once

#include <stdint.h>

#include "checks.h"
#include "slices.h"

namespace hb {

// The tile of the output that a thread block makes, and the stages of K that it keeps on the way. Warps share out the
// rows of W; the rows of x are each warp's, or shared out among `token_warps`.
struct MatmulTile {
    int rows;    // of W
    int tokens;  // rows of x
    int token_warps;
    int stage_values;  // of K
    int stages;
};

template <int Count>
constexpr int count_of(const MatmulTile (&)[Count]) {
    return Count;
}

struct MatmulPlan {
    int tile;  // its number in the kernel's table
    int64_t token_tiles;
    int64_t tiles;         // of the output
    int64_t slice_values;  // of K in a slice, but for the last one
    int64_t slices;
    bool apart;  // a thread block for each slice

    unsigned blocks() const {
        // As many tiles as a grid cannot have would be an output that no device can hold.
        return static_cast<unsigned>(tiles * (apart ? slices : 1));
    }
    int64_t workspace_bytes(int64_t M, int64_t N) const { return apart ? slices * M * N * 4 : 0; }
};

// The number of the tile for M rows: tables are in ascending order of tokens, and the first that has room for all rows
// is taken, or else the last.
template <int Count>
int tile_for(const MatmulTile (&tiles)[Count], int64_t M) {
    int tile = 0;
    while (tile + 1 < Count && tiles[tile].tokens < M) ++tile;
    return tile;
}

template <int Count>
MatmulPlan plan_tiles(const MatmulTile (&tiles)[Count], int64_t M, int64_t N) {
    MatmulPlan plan = {};
    plan.tile = tile_for(tiles, M);
    plan.token_tiles = ceil_div(M, tiles[plan.tile].tokens);
    plan.tiles = ceil_div(N, tiles[plan.tile].rows) * plan.token_tiles;
    return plan;
}

inline void take(const Slices& slices, MatmulPlan* plan) {
    plan->slice_values = slices.steps * kSliceStep;
    plan->slices = slices.count;
}

// For float32 sums, whose slices are chosen for tiles of `smallest_rows` rows of W whatever M is.
template <int Count>
MatmulPlan plan_float_sums(const MatmulTile (&tiles)[Count], int64_t smallest_rows, int64_t M, int64_t N, int64_t K) {
    MatmulPlan plan = plan_tiles(tiles, M, N);
    take(cut_for_few_rows(smallest_rows, N, K), &plan);
    plan.apart = plan.slices > 1 && plan.tiles < kEnoughBlocks;
    return plan;
}

}  // namespace hb
