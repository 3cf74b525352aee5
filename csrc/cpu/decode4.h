// 4-bit codes and their absmax -> float32 values, for the operators that read packed weights.
#pragma once

#include <stdint.h>

namespace hb {

// The values that each byte stands for, first and second: 256 pairs of float32.
struct PairTable {
    float pairs[256][2];
};

// The table of HB_NF4 or HB_FP4.
const PairTable& pair_table(int64_t format);

// Where the absmax of a block is found: plain float32, or double-quantized 8-bit codes.
struct AbsmaxSource {
    const void* absmax;          // float32 [B], or uint8 [B] when nested_absmax is given
    const float* nested_absmax;  // float32 [ceil(B/nested_blocksize)] or null
    const float* offset;         // float32 [1] or null
    int64_t nested_blocksize;
};

// absmax of blocks [first, first + count) as float32. (absmax.cpp: the product and the sum are rounded separately.)
void load_absmax(const AbsmaxSource& source, int64_t first, int64_t count, float* out);

// The same: where they lie, if they are float32, or in `room`.
const float* absmax_at(const AbsmaxSource& source, int64_t first, int64_t count, float* room);

// Values [first, first + count) of the flattened tensor; absmax[0] belongs to the block that holds `first`.
void decode4(const PairTable& table, const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t first,
             int64_t count, float* out);

}  // namespace hb
