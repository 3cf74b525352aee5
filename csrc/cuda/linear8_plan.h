// Choosing how the tensor-core kernels of the 8-bit matmul cut their work. Plain host code; the .cu files compute.
//
// Tiles of the output by M, sums over K in slices (slices.h):
//
//     float32 sums   where slices begin depends on N and K alone, never on M: a row has the same bits in every batch
//     int32 sums     are exact, so that slices may be cut as it suits; a slice is never so long that a sum overflows
#pragma once

#include <stdint.h>

#include "checks.h"
#include "halfbyte.h"
#include "slices.h"

namespace hb {

constexpr int64_t kExactTerms = 1 << 17;  // products, of at most 127 * 128 each, whose sum an int32 holds

// The tile of the output that a thread block makes, and the stages of K that it keeps on the way. Four warps share out
// the rows of W; the rows of x are each warp's, or shared out among `token_warps`.
struct Linear8Tile {
    int rows;    // of W
    int tokens;  // rows of x
    int token_warps;
    int stage_values;  // of K
    int stages;
};

// In ascending order of tokens: the first that has room for all of M is taken, or else the last.
constexpr Linear8Tile kTilesOfInt8Weights[] = {
    {64, 8, 1, 128, 4},
    {64, 16, 1, 128, 4},
    {64, 32, 1, 128, 4},
    {128, 64, 1, 64, 4},
};
constexpr Linear8Tile kTilesOfInt8[] = {
    {64, 8, 1, 128, 4}, {64, 16, 1, 128, 4}, {64, 32, 1, 128, 4}, {128, 64, 1, 64, 4}, {128, 128, 2, 64, 4},
};

constexpr int kFinishedTile = 2;  // of these, the one in which slices are added up and finished

template <int Count>
constexpr int count_of(const Linear8Tile (&)[Count]) {
    return Count;
}

struct Linear8Plan {
    int tile;  // its number in the table
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

template <int Count>
Linear8Plan plan_tiles(const Linear8Tile (&tiles)[Count], int64_t M, int64_t N) {
    Linear8Plan plan = {};
    while (plan.tile + 1 < Count && tiles[plan.tile].tokens < M) ++plan.tile;
    plan.token_tiles = ceil_div(M, tiles[plan.tile].tokens);
    plan.tiles = ceil_div(N, tiles[plan.tile].rows) * plan.token_tiles;
    return plan;
}

inline void take(const Slices& slices, Linear8Plan* plan) {
    plan->slice_values = slices.steps * kSliceStep;
    plan->slices = slices.count;
}

// For float32 sums: of 16-bit x with decoded weights.
inline Linear8Plan plan_int8_weights(int64_t M, int64_t N, int64_t K) {
    Linear8Plan plan = plan_tiles(kTilesOfInt8Weights, M, N);
    take(cut_for_few_rows(kSmallestWeightRows, N, K), &plan);
    plan.apart = plan.slices > 1 && plan.tiles < kEnoughBlocks;
    return plan;
}

// For int32 sums: of int8 with int8.
inline Linear8Plan plan_int8_products(int64_t M, int64_t N, int64_t K) {
    Linear8Plan plan = plan_tiles(kTilesOfInt8, M, N);
    const int64_t to_be_exact = K == 0 ? 1 : ceil_div(K, kExactTerms);
    const int64_t to_be_busy = ceil_div(kEnoughBlocks, plan.tiles);
    take(cut_sum(K, to_be_exact > to_be_busy ? to_be_exact : to_be_busy), &plan);
    plan.apart = plan.slices > 1;
    return plan;
}

}  // namespace hb
