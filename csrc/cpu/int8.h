// Rounding to int8 codes, for weights (int8.cpp) and activations (linear8.cpp).
#pragma once

#include <math.h>
#include <stdint.h>

#include "clones.h"
#include "formats.h"

namespace hb {

// 127 / absmax, in two roundings as bitsandbytes' own files have it; 0 where that is not finite, so that such a row's
// codes are zeros.
HB_INLINE float int8_factor(float absmax) {
    const float factor = (1.0f / absmax) * kInt8Max;
    return isfinite(factor) ? factor : 0.0f;
}

// To nearest, ties to even; 0 for what is not finite or beyond the codes.
HB_INLINE int8_t nearest_int8(float scaled) {
    // Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to nearest, ties to even.
    const float rounded = (scaled + 0x1.8p23f) - 0x1.8p23f;
    const float bounded = rounded >= -kInt8Max && rounded <= kInt8Max ? rounded : 0.0f;  // NaN and infinity: 0
    return static_cast<int8_t>(static_cast<int32_t>(bounded));
}

// codes[i] = values[i] * factor to nearest, ties to even; 0 for a product that is not finite.
void round_to_int8(const float* values, int64_t count, float factor, int8_t* codes);

// What int8_avx512.cpp does of a row: each starts at its first element and returns how many it has done, 0 on a CPU
// without AVX-512.
int64_t largest_avx512(const void* row, int64_t dtype, int64_t count, float* largest);
int64_t quantize_avx512(const void* row, int64_t dtype, int64_t count, float absmax, int8_t* codes);
int64_t dequantize_avx512(const int8_t* codes, int64_t count, float absmax, void* out, int64_t dtype, bool streams);

}  // namespace hb
