// What linear4.cpp and its AVX-512 variant share: the tile's size, the order of summation, the rows of a group.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "decode4.h"

namespace hb {

constexpr int64_t kLanes = 16;
constexpr int64_t kWeightRows = 4;      // decoded together
constexpr int64_t kActivationRows = 4;  // multiplied together

// The one order in which the lanes of a sum are added.
HB_INLINE float add_lanes(float* sums) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

// kWeightRows rows of a packed weight, each beginning on a byte and on a multiple of kLanes values.
struct FusedRows {
    const PairTable* table;
    int64_t K;
    int64_t blocksize;
    const uint8_t* packed[kWeightRows];  // K / 2 bytes each
    const float* absmax[kWeightRows];    // of the blocks the row touches, in order
    int64_t left[kWeightRows];           // values of the row in its first block
};

// Whether this CPU and these sizes allow multiply_fused: no run of kLanes values may straddle two blocks or two rows.
bool can_fuse(int64_t K, int64_t blocksize);

// sums[r][n] = row r of x (float32, padded_k apart) times weight row n; 1 to kActivationRows rows of x.
void multiply_fused(int64_t rows, const float* x, int64_t padded_k, const FusedRows& weight,
                    float (*sums)[kWeightRows]);

}  // namespace hb
