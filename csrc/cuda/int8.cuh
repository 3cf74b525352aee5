// Rounding to int8 codes, for weights (int8.cu) and activations (linear8_split.cu), and codes as 16-bit values.
#pragma once

#include <type_traits>

#include "vocabulary.cuh"

namespace hb {

// 127 / absmax in two roundings; 0 where that is not finite, so that such a row's codes are zeros.
__device__ inline float int8_factor(float absmax) {
    const float factor = __fmul_rn(__fdiv_rn(1.0f, absmax), kInt8Max);
    return isfinite(factor) ? factor : 0.0f;
}

// What a code of a row counts.
__device__ inline float int8_scale(float absmax) {
    return __fdiv_rn(absmax, kInt8Max);
}

// To nearest, ties to even; 0 for a product that is not finite.
__device__ inline int8_t int8_code(float value, float factor) {
    const float scaled = __fmul_rn(value, factor);
    return isfinite(scaled) ? static_cast<int8_t>(__float2int_rn(scaled)) : static_cast<int8_t>(0);
}

// Two codes in the low bytes of 16 bits each -> two values of T side by side, exactly. A code is its low seven bits
// minus its eighth, which stands for 128; put into the fraction of a power of two P whose fraction counts in ones, they
// are P + low and P + eighth.
template <typename T>
__device__ unsigned pair_of_codes(unsigned codes) {
    constexpr bool half = std::is_same<T, __half>::value;
    using Pair = typename std::conditional<half, __half2, __nv_bfloat162>::type;
    constexpr unsigned powers = half ? 0x64006400u : 0x43004300u;  // 1024, and 128
    const unsigned low = (codes & 0x007f007fu) | powers;
    const unsigned eighth = (codes & 0x00800080u) | powers;
    Pair minuend, subtrahend;
    memcpy(&minuend, &low, sizeof low);
    memcpy(&subtrahend, &eighth, sizeof eighth);
    const Pair difference = __hsub2(minuend, subtrahend);
    unsigned pair;
    memcpy(&pair, &difference, sizeof pair);
    return pair;
}

}  // namespace hb
