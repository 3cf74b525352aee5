// silu(gate) * up, value by value; the same bits at every instruction set. silu itself is in silu.h.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"
#include "silu.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values converted at a time

// This file is compiled without contraction: each of these is rounded.
struct Rounded {
    static HB_INLINE float add(float a, float b) { return a + b; }
    static HB_INLINE float multiply(float a, float b) { return a * b; }
    static HB_INLINE float divide(float a, float b) { return a / b; }
    static HB_INLINE uint32_t bits_of(float value) { return hb::bits_of(value); }
    static HB_INLINE float value_of(uint32_t bits) { return float_of(bits); }
};

HB_CLONES(void, silu_all, (float* values, int64_t count)) {
    for (int64_t i = 0; i < count; ++i) values[i] = silu<Rounded>(values[i]);
}

void run(const hb_swiglu_args& a, int64_t at, int64_t count) {
    float values[kPiece];
    load_floats(a.gate, a.dtype, at, count, values);
    silu_all(values, count);
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
