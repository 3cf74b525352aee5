// silu(gate) * up. Equal to the CPU library bit for bit: silu.h is the same, with operations that the compiler never
// fuses.
#include "pairwise.cuh"
#include "silu.h"

namespace hb {

namespace {

struct Rounded {
    __device__ static float add(float a, float b) { return __fadd_rn(a, b); }
    __device__ static float multiply(float a, float b) { return __fmul_rn(a, b); }
    __device__ static float divide(float a, float b) { return __fdiv_rn(a, b); }
    __device__ static uint32_t bits_of(float value) { return __float_as_uint(value); }
    __device__ static float value_of(uint32_t bits) { return __uint_as_float(bits); }
};

struct Gated {
    template <typename T>
    __device__ static T of(T gate, T up) {
        return from_float<T>(__fmul_rn(to_float(from_float<T>(silu<Rounded>(to_float(gate)))), to_float(up)));
    }
};

}  // namespace

}  // namespace hb

extern "C" hb_status hb_swiglu(const hb_swiglu_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_swiglu_args& a = *args;
    if (a.n == 0) return HB_OK;
    launch_pairwise<Gated>(a.call, a.dtype, a.gate, a.up, a.n, a.out);
    return launched();
}
