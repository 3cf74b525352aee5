// Codes of 4-bit blocks, for the operators that write packed weights: quantize4.cpp and encode4.cpp.
#pragma once

#include <stdint.h>

namespace hb {

// Values in blocks and where their codes go.
struct Blocks4 {
    const void* x;      // [n]
    int64_t x_dtype;    // HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16
    int64_t n;          // the last block may be short
    int64_t format;     // HB_NF4 or HB_FP4
    int64_t blocksize;  // a power of two from 32 to 4096
    uint8_t* packed;    // [ceil(n/2)]
};

// Codes of blocks [begin, end) at scales[block], or where scales is null at the block's largest magnitude, which is
// then written to absmax[block].
void encode_blocks(const Blocks4& blocks, int64_t begin, int64_t end, const float* scales, float* absmax);

// The same from `begin` on, at most to `end`; returns the first block that it leaves: one that is short or whose scale
// is zero, tiny or not finite, and every block on a CPU without AVX-512.
int64_t encode_blocks_avx512(const Blocks4& blocks, int64_t begin, int64_t end, const float* scales, float* absmax);

}  // namespace hb
