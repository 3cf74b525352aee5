// 4-bit codes -> values. One thread per value: T(table[code] * absmax), one product and one rounding.
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void dequantize4(const uint8_t* packed, const float* absmax, int64_t n, int64_t format, int64_t blocksize,
                            T* out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        out[i] = from_float<T>(__fmul_rn(code_value(format, code_at(packed, i)), absmax[i / blocksize]));
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_dequantize4(const hb_dequantize4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize4_args& a = *args;
    if (a.n == 0) return HB_OK;
    const unsigned blocks = blocks_for(a.n, kThreads);
    with_dtype(a.out_dtype, [&](auto type) {
        using T = decltype(type);
        launch(dequantize4<T>, blocks, kThreads, 0, stream_of(a.call), a.packed, a.absmax, a.n, a.format, a.blocksize,
               static_cast<T*>(a.out));
    });
    return launched();
}
