// How the tensor-core kernels of the 4-bit matmul cut their work (matmul_plan.h). Plain host code; linear4_mma.cu and
// linear4_experts_mma.cu compute.
#pragma once

#include "experts_plan.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

constexpr int kStageValues = static_cast<int>(kSliceStep);  // of K, in one stage of the pipeline

constexpr MatmulTile kTilesOf4Bits[] = {
    {64, 8, 1, kStageValues, 4, 2},
    {64, 16, 1, kStageValues, 4, 2},
    {64, 32, 1, kStageValues, 4, 2},
    {128, 64, 1, kStageValues, 2, 2},
};
// No more than 64 rows of W, where more would take more registers than there are: weights in blocks of 32 values have
// twice as many scales, and experts pointers of their own.
constexpr MatmulTile kSmallTilesOf4Bits[] = {
    {64, 8, 1, kStageValues, 4, 2},
    {64, 16, 1, kStageValues, 4, 2},
    {64, 32, 1, kStageValues, 4, 2},
    {64, 64, 1, kStageValues, 3, 1},
};

constexpr int64_t kMostColumns = int64_t{1} << 24;  // of W: kernels count the weights of 128 rows in 32 bits

// Whether the kernels take these shapes at all: where there is an output, not a question of M either. Codes of absmax
// come in blocks of a power of two, as checkpoints have them.
template <typename Args>
bool mma_takes(const Args& a) {
    const bool nested_shift = a.nested_absmax == nullptr || (a.nested_blocksize & (a.nested_blocksize - 1)) == 0;
    const bool has_output = a.x_dtype != HB_FLOAT32 && a.M > 0 && a.N > 0;
    return has_output && a.K > 0 && a.K <= kMostColumns && a.K % kChunkValues == 0 && nested_shift;
}

// What the table is multiplied by before it is rounded to the dtype of x; sums are divided by it.
inline float lift_of(int64_t format, int64_t x_dtype) {
    if (format != HB_NF4) return kFp4Lift;
    return x_dtype == HB_FLOAT16 ? kNf4LiftInFloat16 : kNf4LiftInBfloat16;
}

// Whether the 64 values that are multiplied together have two blocks.
template <typename Args>
bool has_small_blocks(const Args& a) {
    return a.blocksize < kChunkValues;
}

inline MatmulPlan plan_linear4(const hb_linear4_args& a) {
    if (has_small_blocks(a)) return plan_float_sums(kSmallTilesOf4Bits, kSmallestWeightRows, a.M, a.N, a.K);
    return plan_float_sums(kTilesOf4Bits, kSmallestWeightRows, a.M, a.N, a.K);
}

// Launches for a checked call that mma_takes, with packed aligned to 16 bytes and the plan's workspace.
void launch_linear4_mma(const hb_linear4_args& a, const MatmulPlan& plan);

// Launches for a checked call that mma_takes, with every matrix's codes aligned to 16 bytes.
void launch_linear4_experts_mma(const hb_linear4_experts_args& a);

}  // namespace hb
