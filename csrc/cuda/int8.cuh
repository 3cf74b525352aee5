// Rounding to int8 codes, for weights (int8.cu) and activations (linear8.cu).
#pragma once

#include "vocabulary.cuh"

namespace hb {

// 127 / absmax in two roundings; 0 where that is not finite, so that such a row's codes are zeros.
__device__ inline float int8_factor(float absmax) {
    const float factor = __fmul_rn(__fdiv_rn(1.0f, absmax), kInt8Max);
    return isfinite(factor) ? factor : 0.0f;
}

// To nearest, ties to even; 0 for a product that is not finite.
__device__ inline int8_t int8_code(float value, float factor) {
    const float scaled = __fmul_rn(value, factor);
    return isfinite(scaled) ? static_cast<int8_t>(__float2int_rn(scaled)) : static_cast<int8_t>(0);
}

}  // namespace hb
