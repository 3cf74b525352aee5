// How the matmuls cut their sums over K into slices. Plain host code.
//
// Each slice's products are added up from zero, then the slices in order. For float32 sums they begin where N and K
// alone say, never M, so that a row has the same bits in every batch. One thread block computes either all slices of
// its tile of the output, or, where that would leave the device idle, just one of them; then another kernel adds them
// up from the workspace, in the same order.
#pragma once

#include <stdint.h>

#include "checks.h"

// The emulation has a smaller device, so that small outputs go both ways.
#ifndef HB_MULTIPROCESSORS
#define HB_MULTIPROCESSORS 132  // of an H200
#endif

namespace hb {

constexpr int64_t kChunkValues = 64;         // of K, decoded at once
constexpr int64_t kSliceStep = 128;          // of K: slices are multiples of it, and it of every stage of a pipeline
constexpr int64_t kFewestStepsInASlice = 4;  // below that, filling the pipeline is most of the work
constexpr int64_t kMultiprocessors = HB_MULTIPROCESSORS;
constexpr int64_t kEnoughBlocks = 2 * kMultiprocessors;  // that a device is kept busy by
constexpr int64_t kSmallestWeightRows = 64;  // of a tile on mma.sync: what slices of float32 sums are chosen for

struct Slices {
    int64_t steps;  // of K in a slice, but for the last one
    int64_t count;
};

// `wanted` slices of K, or fewer where they would be short; one where K is 0.
inline Slices cut_sum(int64_t K, int64_t wanted) {
    const int64_t steps = K == 0 ? 1 : ceil_div(K, kSliceStep);
    const int64_t possible = ceil_div(steps, kFewestStepsInASlice);
    const int64_t of_slice = ceil_div(steps, wanted < possible ? wanted : possible);
    return {of_slice, ceil_div(steps, of_slice)};
}

// As many as keep the device busy for one tile of M rows, where tiles have `smallest_rows` rows of W.
inline Slices cut_for_few_rows(int64_t smallest_rows, int64_t N, int64_t K) {
    return cut_sum(K, ceil_div(kEnoughBlocks, ceil_div(N, smallest_rows)));
}

}  // namespace hb
