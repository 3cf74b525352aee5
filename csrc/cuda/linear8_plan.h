// How the tensor-core kernels of the 8-bit matmul cut their work (matmul_plan.h). Plain host code.
//
//     float32 sums   where slices begin depends on N and K alone, never on M: a row has the same bits in every batch
//     int32 sums     are exact, so that slices may be cut as it suits; a slice is never so long that a sum overflows
#pragma once

#include "matmul_plan.h"

namespace hb {

constexpr int64_t kExactTerms = 1 << 17;  // products, of at most 127 * 128 each, whose sum an int32 holds

constexpr MatmulTile kTilesOfInt8Weights[] = {
    {64, 8, 1, 128, 4, 2},
    {64, 16, 1, 128, 4, 2},
    {64, 32, 1, 128, 4, 2},
    {128, 64, 1, 64, 4, 2},
};
constexpr MatmulTile kTilesOfInt8[] = {
    {64, 8, 1, 128, 4, 2},  {64, 16, 1, 128, 4, 2},  {64, 32, 1, 128, 4, 2},
    {128, 64, 1, 64, 4, 2}, {128, 128, 2, 64, 4, 1},
};

constexpr int kFinishedTile = 2;  // of these, the one in which slices are added up and finished

// Of 16-bit x with decoded weights.
inline MatmulPlan plan_int8_weights(int64_t M, int64_t N, int64_t K) {
    return plan_float_sums(kTilesOfInt8Weights, kSmallestWeightRows, M, N, K);
}

// Of int8 with int8.
inline MatmulPlan plan_int8_products(int64_t M, int64_t N, int64_t K) {
    MatmulPlan plan = plan_tiles(kTilesOfInt8, M, N);
    const int64_t to_be_exact = K == 0 ? 1 : ceil_div(K, kExactTerms);
    const int64_t to_be_busy = ceil_div(kEnoughBlocks, plan.tiles);
    take(cut_sum(K, to_be_exact > to_be_busy ? to_be_exact : to_be_busy), &plan);
    plan.apart = plan.slices > 1;
    return plan;
}

}  // namespace hb
