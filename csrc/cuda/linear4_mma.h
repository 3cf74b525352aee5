// How the tensor-core kernels of the 4-bit matmul cut their work (matmul_plan.h). Plain host code; linear4_mma.cu and
// linear4_experts_mma.cu compute.
#pragma once

#include "experts_plan.h"
#include "halfbyte.h"

namespace hb {

constexpr int kStageValues = static_cast<int>(kSliceStep);  // of K, in one stage of the pipeline

constexpr MatmulTile kTilesOf4Bits[] = {
    {64, 8, 1, kStageValues, 4},
    {64, 16, 1, kStageValues, 4},
    {64, 32, 1, kStageValues, 4},
    {128, 64, 1, kStageValues, 3},
};
// No more than 64 rows of W: a tile of an expert with few rows is not full, and its pointers take registers.
constexpr MatmulTile kTilesOf4BitExperts[] = {
    {64, 8, 1, kStageValues, 4},
    {64, 16, 1, kStageValues, 4},
    {64, 32, 1, kStageValues, 4},
    {64, 64, 1, kStageValues, 3},
};

// Whether the kernels take these shapes at all: where there is an output, not a question of M either.
template <typename Args>
bool mma_takes(const Args& a) {
    return a.x_dtype != HB_FLOAT32 && a.M > 0 && a.N > 0 && a.K > 0 && a.K % kChunkValues == 0;
}

inline MatmulPlan plan_linear4(int64_t M, int64_t N, int64_t K) {
    return plan_float_sums(kTilesOf4Bits, kSmallestWeightRows, M, N, K);
}

// Launches for a checked call that mma_takes, with packed aligned to 16 bytes and the plan's workspace.
void launch_linear4_mma(const hb_linear4_args& a, const MatmulPlan& plan);

// Launches for a checked call that mma_takes, with every matrix's codes aligned to 16 bytes.
void launch_linear4_experts_mma(const hb_linear4_experts_args& a);

}  // namespace hb
