// In the place of CUDA's header of this name: bfloat16 as csrc/cuda uses it.
#pragma once

#include <stdint.h>

#include "emulator.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 low, high;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    return hb::emulation::from_bfloat(value.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    return {hb::emulation::to_bfloat(value)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(__bfloat162float(a.low) - __bfloat162float(b.low),
                                 __bfloat162float(a.high) - __bfloat162float(b.high));
}
