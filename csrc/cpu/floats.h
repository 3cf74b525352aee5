// float16 and bfloat16 <-> float32 in integer arithmetic without branches, so that loops over them vectorise anywhere.
//
// Rounding is to nearest, ties to even; subnormals and infinities are kept, a NaN stays a NaN.
#pragma once

#include <stdint.h>
#include <string.h>

#include "clones.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

HB_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

HB_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

HB_INLINE float from_half(uint16_t half) {
    // Exponent and fraction moved into place, then 2^112 corrects the exponent's bias, subnormals included.
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t finite = magnitude >= 0x0f800000u ? scaled | 0x7f800000u : scaled;
    return float_of(finite | static_cast<uint32_t>(half & 0x8000) << 16);
}

HB_INLINE uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the adder rounds at 2^-24
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | (bits & 0x80000000u) >> 16);
}

HB_INLINE float from_bfloat(uint16_t value) {
    return float_of(static_cast<uint32_t>(value) << 16);
}

HB_INLINE uint16_t to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// `count` values starting at element `first` of a tensor of `dtype`, as float32; of HB_INT8, the codes.
void load_floats(const void* tensor, int64_t dtype, int64_t first, int64_t count, float* out);

// The other way, each value rounded once.
void store_floats(const float* values, int64_t count, void* tensor, int64_t dtype, int64_t first);

// The dtypes: how a value is kept, and what it is in float32.
struct Float32 {
    using Kept = float;
    static HB_INLINE float load(float value) { return value; }
    static HB_INLINE float store(float value) { return value; }
};
struct Float16 {
    using Kept = uint16_t;
    static HB_INLINE float load(uint16_t value) { return from_half(value); }
    static HB_INLINE uint16_t store(float value) { return to_half(value); }
};
struct Bfloat16 {
    using Kept = uint16_t;
    static HB_INLINE float load(uint16_t value) { return from_bfloat(value); }
    static HB_INLINE uint16_t store(float value) { return to_bfloat(value); }
};

// A product of two values of a dtype, the first of which is rounded to it before.
template <typename Dtype>
HB_INLINE typename Dtype::Kept product(float exact, typename Dtype::Kept factor) {
    return Dtype::store(Dtype::load(Dtype::store(exact)) * Dtype::load(factor));
}

// Of three functions, one for each of them, that of `dtype`.
template <typename Function>
HB_INLINE Function for_dtype(int64_t dtype, Function float32, Function float16, Function bfloat16) {
    return dtype == HB_FLOAT32 ? float32 : dtype == HB_FLOAT16 ? float16 : bfloat16;
}

// One element.
HB_INLINE float load_float(const void* tensor, int64_t dtype, int64_t index) {
    if (dtype == HB_FLOAT32) return static_cast<const float*>(tensor)[index];
    const uint16_t bits = static_cast<const uint16_t*>(tensor)[index];
    return dtype == HB_FLOAT16 ? from_half(bits) : from_bfloat(bits);
}

// The largest magnitude. Compared as integers, where infinities and NaNs are the largest: none is lost.
HB_INLINE float largest_magnitude(const float* values, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(values[i]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(static_cast<uint32_t>(largest));
}

// What divides the values of a block by its scale: value * lift * reciprocal, where the lift is 1 but for scales so
// small that their reciprocal would not be finite. A scale of 0 gives zeros.
struct Normaliser {
    float lift;
    float reciprocal;

    HB_INLINE explicit Normaliser(float scale) {
        const float magnitude = scale < 0 ? -scale : scale;
        lift = magnitude < kSmallestDivisor ? kSubnormalScale : 1.0f;
        const float divisor = scale * lift;
        reciprocal = divisor == 0 ? 0.0f : 1.0f / divisor;
    }
    HB_INLINE float operator()(float value) const { return value * lift * reciprocal; }
};

}  // namespace hb
