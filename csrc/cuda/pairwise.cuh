// One value from two, all along two tensors of one length: the kernel and its launch. What the value is, the operators
// say (add.cu, swiglu.cu). A thread takes 16 bytes of each tensor at once, or one value where they are not aligned to
// that.
#pragma once

#include "pieces.cuh"
#include "vocabulary.cuh"

namespace hb {

constexpr int kPairwiseThreads = 256;

// out[i] = Operator::of(a[i], b[i]): the first `pieces` of 16 bytes, then the values behind them. Out may be a or b:
// each thread reads what it writes.
template <typename Operator, typename T>
__global__ void __launch_bounds__(kPairwiseThreads)
    pairwise(const T* a, const T* b, int64_t pieces, int64_t n, T* out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kPairwiseThreads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPairwiseThreads + threadIdx.x;
    for (int64_t i = first; i < pieces; i += stride) {
        Piece<T> found = load_piece(a, i);
        const Piece<T> others = load_piece(b, i);
#pragma unroll
        for (int v = 0; v < Piece<T>::kValues; ++v) found.values[v] = Operator::of(found.values[v], others.values[v]);
        store_piece(found, out, i);
    }
    for (int64_t i = pieces * Piece<T>::kValues + first; i < n; i += stride) out[i] = Operator::of(a[i], b[i]);
}

// n > 0 values of `dtype`.
template <typename Operator>
void launch_pairwise(const hb_call& call, int64_t dtype, const void* a, const void* b, int64_t n, void* out) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const bool is_aligned = in_pieces(a) && in_pieces(b) && in_pieces(out);
        const int64_t pieces = is_aligned ? n / Piece<T>::kValues : 0;
        launch(pairwise<Operator, T>, blocks_for(is_aligned ? pieces + 1 : n, kPairwiseThreads), kPairwiseThreads, 0,
               stream_of(call), static_cast<const T*>(a), static_cast<const T*>(b), pieces, n, static_cast<T*>(out));
    });
}

}  // namespace hb
