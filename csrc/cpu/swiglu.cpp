// silu(gate) * up, value by value; the same bits at every instruction set. silu itself is in silu.h.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"
#include "silu.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values that no two threads share

// This file is compiled without contraction: each of these is rounded.
struct Rounded {
    static HB_INLINE float add(float a, float b) { return a + b; }
    static HB_INLINE float multiply(float a, float b) { return a * b; }
    static HB_INLINE float divide(float a, float b) { return a / b; }
    static HB_INLINE uint32_t bits_of(float value) { return hb::bits_of(value); }
    static HB_INLINE float value_of(uint32_t bits) { return float_of(bits); }
};

template <typename Dtype>
HB_INLINE void multiply(const hb_swiglu_args& a, int64_t begin, int64_t end) {
    using Kept = typename Dtype::Kept;
    const Kept *const gate = static_cast<const Kept*>(a.gate), *const up = static_cast<const Kept*>(a.up);
    Kept* const out = static_cast<Kept*>(a.out);
    for (int64_t i = begin; i < end; ++i) out[i] = product<Dtype>(silu<Rounded>(Dtype::load(gate[i])), up[i]);
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_swiglu(const hb_swiglu_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_swiglu_args& a = *args;
    const auto run = for_dtype(a.dtype, Clones<multiply<Float32>>::run, Clones<multiply<Float16>>::run,
                               Clones<multiply<Bfloat16>>::run);
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, kPiece), [&](int64_t, int64_t begin, int64_t end) {
        run(a, begin * kPiece, end * kPiece < a.n ? end * kPiece : a.n);
    });
    return HB_OK;
}
