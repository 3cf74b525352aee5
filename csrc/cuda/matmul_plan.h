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
    int beside;  // thread blocks of it that a multiprocessor of an A100 or an H200 has room for, up to two
};

constexpr int kFewTokens = 32;  // in a tile that waits for weights rather than for tensor cores

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

// Whether so many tiles leave the device so idle that each of their slices gets a thread block, and goes to the
// workspace and back as float32. For few rows of x that is less than the weights are: such tiles are cut where not all
// that fit at once are there. Of a wide tile a slice takes about as long again as its products: 128 by 128 sums,
// written and read, are 128 KiB, by reckoning 4 us of a multiprocessor's share of an H200's memory, and four stages of
// K are 2.8 us of its tensor cores. So these are cut where more than half of the device would be idle.
inline bool leave_room_for_slices(const MatmulTile& tile, int64_t tiles) {
    const int64_t at_once = kMultiprocessors * tile.beside;
    return tile.tokens <= kFewTokens ? tiles < at_once : 2 * tiles < at_once;
}

// For float32 sums, whose slices are chosen for tiles of `smallest_rows` rows of W whatever M is.
template <int Count>
MatmulPlan plan_float_sums(const MatmulTile (&tiles)[Count], int64_t smallest_rows, int64_t M, int64_t N, int64_t K) {
    MatmulPlan plan = plan_tiles(tiles, M, N);
    take(cut_for_few_rows(smallest_rows, N, K), &plan);
    plan.apart = plan.slices > 1 && leave_room_for_slices(tiles[plan.tile], plan.tiles);
    return plan;
}

}  // namespace hb
