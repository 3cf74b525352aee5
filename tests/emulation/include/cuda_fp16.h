// In the place of CUDA's header of this name: float16 as csrc/cuda uses it.
#pragma once

#include <stdint.h>

#include "emulator.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half low, high;
};

inline float __half2float(__half value) {
    return hb::emulation::from_half(value.bits);
}
inline __half __float2half_rn(float value) {
    return {hb::emulation::to_half(value)};
}
inline __half2 __floats2half2_rn(float low, float high) {
    return {__float2half_rn(low), __float2half_rn(high)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.low) - __half2float(b.low), __half2float(a.high) - __half2float(b.high));
}
