// silu(g) = g / (1 + e^-g) in float32, spelled once for both libraries, so that they give the same bits.
//
//     e^x = 2^n * e^r      n the integer nearest to x log2 e, |r| <= log(2) / 2
//
// e^r is its Taylor polynomial of degree 7, off by 5e-9; with the roundings, silu is within 3e-7 of its value,
// relatively. Where e^-g leaves float32, from g = -88.8 down, silu is -0; so it is in torch.
//
// `Rounded` brings the arithmetic, each operation rounded by itself: add, multiply, divide, and a float's bits.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HB_SILU_INLINE __device__ inline
#else
#define HB_SILU_INLINE inline __attribute__((always_inline))
#endif

namespace hb {

constexpr uint32_t kLargestPowerBits = 0x42fc0000u;  // 126
constexpr float kSiluLog2E = 0x1.715476p+0f;
constexpr float kLog2High = 0x1.62e4p-1f;  // log(2) in two parts: n times the first is exact
constexpr float kLog2Low = 0x1.7f7d1cp-20f;
constexpr float kToInteger = 0x1.8p23f;  // added and taken away again, it leaves the nearest integer
constexpr uint32_t kToIntegerBits = 0x4b400000u;

template <typename Rounded>
HB_SILU_INLINE float power_of_two(int32_t exponent) {
    return Rounded::value_of(static_cast<uint32_t>(exponent + 127) << 23);
}

// Beyond what float32 holds, infinity or a number next to zero; of a NaN, anything. The magnitude is cut off as an
// integer: a comparison of floats with a constant is taken for a branch of its own, which ends in a division of its
// own.
template <typename Rounded>
HB_SILU_INLINE float exponential(float exact) {
    const uint32_t bits = Rounded::bits_of(exact), magnitude = bits & 0x7fffffffu;
    const float x =
        Rounded::value_of((magnitude < kLargestPowerBits ? magnitude : kLargestPowerBits) | (bits & 0x80000000u));
    const float shifted = Rounded::add(Rounded::multiply(x, kSiluLog2E), kToInteger);
    const float n = Rounded::add(shifted, -kToInteger);
    const float near = Rounded::add(x, -Rounded::multiply(n, kLog2High));
    const float r = Rounded::add(near, -Rounded::multiply(n, kLog2Low));
    float q = 1.0f / 5040;
    q = Rounded::add(Rounded::multiply(q, r), 1.0f / 720);
    q = Rounded::add(Rounded::multiply(q, r), 1.0f / 120);
    q = Rounded::add(Rounded::multiply(q, r), 1.0f / 24);
    q = Rounded::add(Rounded::multiply(q, r), 1.0f / 6);
    q = Rounded::add(Rounded::multiply(q, r), 0.5f);
    q = Rounded::add(Rounded::multiply(q, r), 1.0f);
    q = Rounded::add(Rounded::multiply(q, r), 1.0f);
    // In two factors, since n goes past both ends of a float32's exponent.
    const int32_t whole = static_cast<int32_t>(Rounded::bits_of(shifted) - kToIntegerBits), half = whole / 2;
    const float some = Rounded::multiply(q, power_of_two<Rounded>(half));
    return Rounded::multiply(some, power_of_two<Rounded>(whole - half));
}

template <typename Rounded>
HB_SILU_INLINE float silu(float x) {
    return Rounded::divide(x, Rounded::add(1.0f, exponential<Rounded>(-x)));
}

}  // namespace hb
