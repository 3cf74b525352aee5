// Choosing how Hopper's kernel of the 4-bit matmul cuts its work. Plain host code; linear4_hopper.cu computes.
//
// Slices of K are cut as for linear4_mma.cu, for tiles with more rows of W. Many rows of x are multiplied a panel at a
// time, so that the copy of x that the kernel reads, rearranged, does not grow with them.
#pragma once

#include "linear4_mma.h"

namespace hb {

constexpr int kHopperRows = 128;            // of W, in a tile of any size
constexpr int64_t kHopperPanelRows = 2048;  // of x, at a time; a multiple of every tile's

constexpr MatmulTile kTilesOfHopper[] = {
    {kHopperRows, 8, 1, kStageValues, 6, 2},   {kHopperRows, 16, 1, kStageValues, 4, 2},
    {kHopperRows, 32, 1, kStageValues, 3, 2},  {kHopperRows, 64, 1, kStageValues, 4, 1},
    {kHopperRows, 128, 1, kStageValues, 3, 1},
};

struct HopperPlan {
    MatmulPlan cut;
    int64_t tokens;       // rows of x in a tile
    int64_t image_bytes;  // of x rearranged, in the workspace's beginning
    int64_t slice_bytes;  // behind it

    int64_t workspace_bytes() const { return image_bytes + slice_bytes; }
};

// Of one panel.
inline HopperPlan plan_hopper(int64_t M, int64_t N, int64_t K) {
    HopperPlan plan = {};
    plan.cut = plan_float_sums(kTilesOfHopper, kHopperRows, M, N, K);
    plan.tokens = kTilesOfHopper[plan.cut.tile].tokens;
    plan.image_bytes = round_up(M, plan.tokens) * round_up(K, kStageValues) * 2;
    plan.slice_bytes = plan.cut.workspace_bytes(M, N);
    return plan;
}

// Of all of them, which take turns.
inline int64_t hopper_workspace_bytes(int64_t M, int64_t N, int64_t K) {
    const int64_t last = plan_hopper(M % kHopperPanelRows, N, K).workspace_bytes();
    const int64_t full = M < kHopperPanelRows ? 0 : plan_hopper(kHopperPanelRows, N, K).workspace_bytes();
    return full > last ? full : last;
}

// HB_OK where the device at hand has capability 9.0 and this library code for it, else HB_NO_KERNEL, or what is wrong
// with the device.
hb_status check_hopper();

// Launches for a checked call that mma_takes on a device that check_hopper accepts, with packed aligned to 16 bytes and
// a workspace of hopper_workspace_bytes.
void launch_linear4_hopper(const hb_linear4_args& a);

}  // namespace hb
