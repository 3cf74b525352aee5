// silu(gate) * up. A thread takes 16 bytes of each tensor at once, or one value where they are not aligned to that.
// Equal to the CPU library bit for bit: silu.h is the same, with operations that the compiler never fuses.
#include "pieces.cuh"
#include "silu.h"
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;

struct Rounded {
    __device__ static float add(float a, float b) { return __fadd_rn(a, b); }
    __device__ static float multiply(float a, float b) { return __fmul_rn(a, b); }
    __device__ static float divide(float a, float b) { return __fdiv_rn(a, b); }
    __device__ static uint32_t bits_of(float value) { return __float_as_uint(value); }
    __device__ static float value_of(uint32_t bits) { return __uint_as_float(bits); }
};

template <typename T>
__device__ T gated(T gate, T up) {
    return from_float<T>(__fmul_rn(to_float(from_float<T>(silu<Rounded>(to_float(gate)))), to_float(up)));
}

// The first `pieces` of 16 bytes, then the values behind them.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu(const T* gate, const T* up, int64_t pieces, int64_t n, T* out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; i < pieces; i += stride) {
        Piece<T> gates = load_piece(gate, i);
        const Piece<T> ups = load_piece(up, i);
#pragma unroll
        for (int v = 0; v < Piece<T>::kValues; ++v) gates.values[v] = gated(gates.values[v], ups.values[v]);
        store_piece(gates, out, i);
    }
    for (int64_t i = pieces * Piece<T>::kValues + first; i < n; i += stride) out[i] = gated(gate[i], up[i]);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_swiglu(const hb_swiglu_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_swiglu_args& a = *args;
    if (a.n == 0) return HB_OK;
    with_dtype(a.dtype, [&](auto type) {
        using T = decltype(type);
        const bool is_aligned = in_pieces(a.gate) && in_pieces(a.up) && in_pieces(a.out);
        const int64_t pieces = is_aligned ? a.n / Piece<T>::kValues : 0;
        launch(swiglu<T>, blocks_for(is_aligned ? pieces + 1 : a.n, kThreads), kThreads, 0, stream_of(a.call),
               static_cast<const T*>(a.gate), static_cast<const T*>(a.up), pieces, a.n, static_cast<T*>(a.out));
    });
    return launched();
}
