// Rotary position embeddings of queries and keys, in place. One warp for each head of each token: a lane turns values d
// and d + D / 2, which nobody else reads. Products and sum are rounded to the dtype one by one, so that the bits are
// the CPU library's.
#include "vocabulary.cuh"

namespace hb {

namespace {

// first * cos + other * sin.
template <typename T>
__device__ T turned(float first, T cos, float other, T sin) {
    const float straight = to_float(from_float<T>(__fmul_rn(first, to_float(cos))));
    const float across = to_float(from_float<T>(__fmul_rn(other, to_float(sin))));
    return from_float<T>(__fadd_rn(straight, across));
}

template <typename T>
__global__ void rotary(T* query, T* key, const T* cos, const T* sin, int64_t rows, int64_t H, int64_t G, int64_t D) {
    const int64_t half = D / 2;
    for (int64_t item = warp_index(); item < rows * (H + G); item += warp_count()) {
        const int64_t row = item / (H + G), head = item % (H + G);
        T* const lower = head < H ? query + (row * H + head) * D : key + (row * G + head - H) * D;
        T* const upper = lower + half;
        for (int64_t d = lane(); d < half; d += kWarp) {
            const float a = to_float(lower[d]), b = to_float(upper[d]);
            const int64_t at = row * D + d;
            lower[d] = turned(a, cos[at], -b, sin[at]);
            upper[d] = turned(b, cos[at + half], a, sin[at + half]);
        }
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_rotary(const hb_rotary_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_rotary_args& a = *args;
    if (a.T * a.D * (a.H + a.G) == 0) return HB_OK;
    with_dtype(a.dtype, [&](auto type) {
        using T = decltype(type);
        launch(rotary<T>, blocks_for_warps(a.T * (a.H + a.G)), kWarpsPerBlock * kWarp, 0, stream_of(a.call),
               static_cast<T*>(a.query), static_cast<T*>(a.key), static_cast<const T*>(a.cos),
               static_cast<const T*>(a.sin), a.T, a.H, a.G, a.D);
    });
    return launched();
}
