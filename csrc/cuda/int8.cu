// Rowwise int8. One warp per row finds the row's maximum and rounds its values; one thread per value goes back. Equal
// to the CPU library bit for bit.
#include "int8.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;

// The value as float16 would hold it; one that float16 would make infinite stays as it is.
__device__ float through_half(float value) {
    const float half = __half2float(__float2half_rn(value));
    return isfinite(half) ? half : value;
}

template <typename T>
__global__ void quantize8(const T* w, int64_t N, int64_t K, int8_t* codes, float* absmax) {
    for (int64_t row = warp_index(); row < N; row += warp_count()) {
        unsigned largest = 0;
        for (int64_t k = lane(); k < K; k += kWarp) {
            largest = max(largest, magnitude_bits(through_half(to_float(w[row * K + k]))));
        }
        const float row_absmax = largest_in_warp(largest);
        const float factor = int8_factor(row_absmax);
        for (int64_t k = lane(); k < K; k += kWarp) {
            codes[row * K + k] = int8_code(through_half(to_float(w[row * K + k])), factor);
        }
        if (lane() == 0) absmax[row] = row_absmax;
    }
}

template <typename T>
__global__ void dequantize8(const int8_t* codes, const float* absmax, int64_t count, int64_t K, T* out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        const float scaled = __fmul_rn(static_cast<float>(codes[i]), absmax[i / K]);
        out[i] = from_float<T>(__fdiv_rn(scaled, kInt8Max));
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize8(const hb_quantize8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize8_args& a = *args;
    if (a.N == 0) return HB_OK;
    with_dtype(a.w_dtype, [&](auto type) {
        using T = decltype(type);
        launch(quantize8<T>, blocks_for_warps(a.N), kWarpsPerBlock * kWarp, 0, stream_of(a.call),
               static_cast<const T*>(a.w), a.N, a.K, a.codes, a.absmax);
    });
    return launched();
}

extern "C" hb_status hb_dequantize8(const hb_dequantize8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize8_args& a = *args;
    if (a.N * a.K == 0) return HB_OK;
    const unsigned blocks = blocks_for(a.N * a.K, kThreads);
    with_dtype(a.out_dtype, [&](auto type) {
        using T = decltype(type);
        launch(dequantize8<T>, blocks, kThreads, 0, stream_of(a.call), a.codes, a.absmax, a.N * a.K, a.K,
               static_cast<T*>(a.out));
    });
    return launched();
}
