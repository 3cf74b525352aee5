// silu(gate) * up, value by value; the same bits at every instruction set.
//
//     silu(g) = g / (1 + e^-g)      e^x = 2^n * e^r, n the integer nearest to x log2 e, |r| <= log(2) / 2
//
// e^r is its Taylor polynomial of degree 7, off by 5e-9; with the roundings, silu is within 3e-7 of its value,
// relatively. Where e^-g leaves float32, from g = -88.8 down, silu is -0; so it is in torch.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values converted at a time
constexpr float kLargestPower = 126.0f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLog2High = 0x1.62e4p-1f;  // log(2) in two parts: n times the first is exact
constexpr float kLog2Low = 0x1.7f7d1cp-20f;
constexpr float kRoundToInteger = 0x1.8p23f;  // added and taken away again, it leaves the nearest integer

HB_INLINE float power_of_two(int32_t exponent) {
    return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}

// A NaN stays one; beyond what float32 holds, infinity or a number next to zero.
HB_INLINE float exponential(float x) {
    x = x > kLargestPower ? kLargestPower : x;
    x = x < -kLargestPower ? -kLargestPower : x;
    const float shifted = x * kLog2E + kRoundToInteger;
    const float n = shifted - kRoundToInteger;
    const float r = (x - n * kLog2High) - n * kLog2Low;
    float q = 1.0f / 5040;
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    q = q * r + 1.0f;
    q = q * r + 1.0f;
    // In two factors, since n goes past both ends of a float32's exponent; cut off, for the n of a NaN is anything.
    const int32_t whole = static_cast<int32_t>(bits_of(shifted) - bits_of(kRoundToInteger)) % 256;
    const int32_t half = whole / 2;
    return q * power_of_two(half) * power_of_two(whole - half);
}

HB_CLONES void silu(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] / (1.0f + exponential(-values[i]));
}

void run(const hb_swiglu_args& a, int64_t at, int64_t count) {
    float values[kPiece];
    load_floats(a.gate, a.dtype, at, count, values);
    silu(values, count);
    store_products(values, count, a.dtype, a.up, at, a.out, at);
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_swiglu(const hb_swiglu_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_swiglu_args& a = *args;
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, kPiece), [&a](int64_t, int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t at = piece * kPiece;
            run(a, at, a.n - at < kPiece ? a.n - at : kPiece);
        }
    });
    return HB_OK;
}
