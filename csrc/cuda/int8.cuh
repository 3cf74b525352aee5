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

// Two of a word's four codes, the first or the last two, as values of T side by side, exactly: as a tensor core takes
// them.
template <typename T, int Half>
__device__ unsigned pair_of_codes(unsigned word) {
    constexpr unsigned bytes = Half == 0 ? 0x4140u : 0x4342u;
    unsigned first, second;
    if constexpr (std::is_same<T, __half>::value) {
        // In the fraction of 1024, which counts in ones, a code plus 128 makes 1024 + 128 + code.
        first = __byte_perm(word ^ 0x80808080u, 0x64646464u, bytes);
        second = 0x64806480u;
    } else {
        // So does the fraction of 128, but it has room for seven bits. A code is those minus its eighth, which stands
        // for 128.
        const unsigned codes = __byte_perm(word, 0, bytes);
        first = masked_with<0x007f007fu, 0x43004300u>(codes);
        second = masked_with<0x00800080u, 0x43004300u>(codes);
    }
    using Pair = typename std::conditional<std::is_same<T, __half>::value, __half2, __nv_bfloat162>::type;
    Pair minuend, subtrahend;
    memcpy(&minuend, &first, sizeof first);
    memcpy(&subtrahend, &second, sizeof second);
    const Pair difference = __hsub2(minuend, subtrahend);
    unsigned pair;
    memcpy(&pair, &difference, sizeof pair);
    return pair;
}

}  // namespace hb
