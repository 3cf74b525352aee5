// Choosing how the tensor-core kernel of the 4-bit matmul cuts its work. Plain host code; linear4_mma.cu computes.
//
// Tiles of the output by M, sums over K in slices (slices.h), which are chosen by N and K alone.
#pragma once

#include <stdint.h>

#include "checks.h"
#include "halfbyte.h"
#include "slices.h"

namespace hb {

constexpr int kStageValues = static_cast<int>(kSliceStep);  // of K, in one stage of the pipeline

// The most tiles of up to `tile_rows` rows that M rows of `experts` experts and of nobody can be cut into, each one's
// by themselves.
inline int64_t most_expert_tiles(int64_t M, int64_t experts, int64_t tile_rows) {
    const int64_t owners = experts + 1 < M ? experts + 1 : M;
    return (M + owners * (tile_rows - 1)) / tile_rows;
}

// The tile of the output that one thread block of 128 threads makes, and the stages that it keeps on the way.
struct Linear4Tile {
    int64_t weight_rows;
    int64_t tokens;
    int64_t stages;
};

struct Linear4Plan {
    Linear4Tile tile;
    int64_t tiles;         // of the output
    int64_t slice_stages;  // stages of K in a slice, but for the last one
    int64_t slices;
    bool apart;  // a thread block for each slice

    int64_t workspace_bytes(int64_t M, int64_t N) const {
        return apart ? slices * M * N * static_cast<int64_t>(sizeof(float)) : 0;
    }
};

// Whether the kernel takes these shapes at all: where there is an output, not a question of M either.
template <typename Args>
bool mma_takes(const Args& a) {
    return a.x_dtype != HB_FLOAT32 && a.M > 0 && a.N > 0 && a.K > 0 && a.K % kChunkValues == 0;
}

inline Linear4Tile tile_for(int64_t M) {
    if (M <= 8) return {64, 8, 4};
    if (M <= 16) return {64, 16, 4};
    if (M <= 32) return {64, 32, 4};
    return {128, 64, 3};
}

// Cuts the work into tiles of a size that M decides, and sums into slices for tiles of `smallest_rows` rows of W.
inline Linear4Plan cut_work(Linear4Tile tile, int64_t smallest_rows, int64_t M, int64_t N, int64_t K) {
    Linear4Plan plan = {};
    plan.tile = tile;
    plan.tiles = ceil_div(N, plan.tile.weight_rows) * ceil_div(M, plan.tile.tokens);
    const Slices slices = cut_for_few_rows(smallest_rows, N, K);
    plan.slice_stages = slices.steps;
    plan.slices = slices.count;
    plan.apart = plan.slices > 1 && plan.tiles < kEnoughBlocks;
    return plan;
}

inline Linear4Plan plan_linear4(int64_t M, int64_t N, int64_t K) {
    return cut_work(tile_for(M), kSmallestWeightRows, M, N, K);
}

// How the rows of experts are cut, which are known only on the device: into tiles for twice the rows that an expert has
// on average, and of no more than 64 rows of W, since a tile of an expert with few rows is not full. Thread blocks go
// over all slices.
struct ExpertsPlan {
    int64_t tokens;       // of a tile; it has kSmallestWeightRows rows of W
    int64_t token_tiles;  // at most
    int64_t slice_stages;
};

inline ExpertsPlan plan_experts(const hb_linear4_experts_args& a) {
    const int64_t tokens = tile_for(2 * ceil_div(a.M, a.E < 1 ? 1 : a.E)).tokens;
    return {tokens, most_expert_tiles(a.M, a.E, tokens), plan_linear4(1, a.N, a.K).slice_stages};
}

// Launches for a checked call with an output that mma_takes, with every matrix's codes aligned to 16 bytes.
void launch_linear4_experts_mma(const hb_linear4_experts_args& a);

// Launches for a checked call that mma_takes, with packed aligned to 16 bytes and the plan's workspace.
void launch_linear4_mma(const hb_linear4_args& a, const Linear4Plan& plan);

}  // namespace hb
