// Choosing how attention over a paged cache is cut into thread blocks. Plain host code; attention.cu says what they do.
//
// A row's keys are taken in spans of 256 positions, from multiples of 256 on. Each span gets a softmax of its own,
// whose maximum, sum and weighted values, its part, go to the workspace, and a second kernel puts a row's parts
// together in order. So a row has the same bits however many thread blocks share its spans, whatever else is in the
// batch.
//
// Everything here follows from shapes, nothing from what the tables say: a CUDA graph stays right when they change.
#pragma once

#include <stdint.h>

#include "checks.h"
#include "halfbyte.h"

namespace hb {

constexpr int kSpanKeys = 256;
constexpr int64_t kMostPartFloats = int64_t{1} << 24;  // of the workspace, unless one row's parts are more
constexpr int64_t kEnoughRowBlocks = 528;              // four for each multiprocessor of an H200
constexpr int64_t kHeadTile = 16;                      // query heads of a kv head that the tensor cores take at once
constexpr int64_t kPlainHeads = 4;                     // query heads of a block without tensor cores, one a warp
constexpr int64_t kMostTileDim = 256;                  // of a head on tensor cores

struct AttentionPlan {
    int64_t spans;  // that a row can have at most
    int64_t rows;   // whose parts are in the workspace together; more rows follow in turns

    int64_t vectors(const hb_paged_attention_args& a) const { return spans * rows * a.H; }
    int64_t workspace_bytes(const hb_paged_attention_args& a) const {
        return (2 * round_up(vectors(a), 8) + vectors(a) * a.E) * static_cast<int64_t>(sizeof(float));
    }
    // Thread blocks that share a row's spans, where `tiles` share its heads.
    int64_t splits(int64_t tiles) const {
        const int64_t wanted = ceil_div(kEnoughRowBlocks, rows * tiles);
        return wanted < spans ? wanted : spans;
    }
};

// For checked shapes; refused where a row's parts would have more elements than a tensor may.
inline hb_status plan_attention(const hb_paged_attention_args& a, AttentionPlan* plan) {
    plan->spans = a.max_blocks == 0 ? 1 : ceil_div(a.max_blocks * a.block_tokens, kSpanKeys);
    int64_t floats = 0;
    HB_REQUIRE(check_shape(plan->spans, a.H * (a.E + 2), &floats));
    const int64_t fitting = kMostPartFloats / floats;
    plan->rows = fitting < 1 ? 1 : fitting;
    if (plan->rows > a.T) plan->rows = a.T;
    return HB_OK;
}

// Whether the tensor cores take these heads: whole pieces of eight values, where a piece may begin, in the dtype of the
// queries or in codes, which that dtype holds exactly.
inline bool on_tensor_cores(const hb_paged_attention_args& a) {
    const uintptr_t both = reinterpret_cast<uintptr_t>(a.keys) | reinterpret_cast<uintptr_t>(a.values);
    const bool fits = a.D <= kMostTileDim && a.E <= kMostTileDim && a.D % 8 == 0 && a.E % 8 == 0;
    const bool multiplies = a.store_dtype == a.dtype || a.store_dtype == HB_INT8;
    return a.dtype != HB_FLOAT32 && multiplies && fits && both % 16 == 0;
}

}  // namespace hb
