// out = a + b, value by value: the sums that carry a model's residual stream. A thread takes 16 bytes of each tensor at
// once, or one value where they are not aligned to that. Torch's bits.
#include "pieces.cuh"
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ T sum_of(T a, T b) {
    return from_float<T>(__fadd_rn(to_float(a), to_float(b)));
}

// The first `pieces` of 16 bytes, then the values behind them. Out may be a or b: each thread reads what it writes.
template <typename T>
__global__ void __launch_bounds__(kThreads) add(const T* a, const T* b, int64_t pieces, int64_t n, T* out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; i < pieces; i += stride) {
        Piece<T> sums = load_piece(a, i);
        const Piece<T> others = load_piece(b, i);
#pragma unroll
        for (int v = 0; v < Piece<T>::kValues; ++v) sums.values[v] = sum_of(sums.values[v], others.values[v]);
        store_piece(sums, out, i);
    }
    for (int64_t i = pieces * Piece<T>::kValues + first; i < n; i += stride) out[i] = sum_of(a[i], b[i]);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_add(const hb_add_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_add_args& a = *args;
    if (a.n == 0) return HB_OK;
    with_dtype(a.dtype, [&](auto type) {
        using T = decltype(type);
        const bool is_aligned = in_pieces(a.a) && in_pieces(a.b) && in_pieces(a.out);
        const int64_t pieces = is_aligned ? a.n / Piece<T>::kValues : 0;
        launch(add<T>, blocks_for(is_aligned ? pieces + 1 : a.n, kThreads), kThreads, 0, stream_of(a.call),
               static_cast<const T*>(a.a), static_cast<const T*>(a.b), pieces, a.n, static_cast<T*>(a.out));
    });
    return launched();
}
