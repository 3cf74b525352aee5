// Root mean square normalisation, one block per row. The CPU library adds the squares up in 16 float32 sums, by column
// modulo 16, and these in halves; so does this one, and the bits are the same. All threads square a piece of the row
// into shared memory, then 16 lanes add it to their sums: the additions of a sum follow each other whoever makes them,
// the reads do not.
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kSums = 16;
constexpr int64_t kPiece = 4096;  // squares in shared memory at a time; a multiple of kSums

// The sum of a row's squares, for all threads. shared: kPiece squares and the sum.
template <typename T>
__device__ float sum_of_squares(const T* x, int64_t K, float* shared) {
    float sum = 0;  // of a lane of the first warp's first half
    for (int64_t begin = 0; begin < K; begin += kPiece) {
        const int64_t count = K - begin < kPiece ? K - begin : kPiece;
        for (int64_t i = threadIdx.x; i < count; i += kThreads) {
            const float value = to_float(x[begin + i]);
            shared[i] = __fmul_rn(value, value);
        }
        block_barrier();
        if (threadIdx.x < kSums) {
            for (int64_t i = threadIdx.x; i < count; i += kSums) sum = __fadd_rn(sum, shared[i]);
        }
        block_barrier();
    }
    if (threadIdx.x < kWarp) {
        for (int distance = static_cast<int>(kSums) / 2; distance > 0; distance /= 2) {
            sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, distance));
        }
        if (threadIdx.x == 0) shared[kPiece] = sum;
    }
    block_barrier();
    return shared[kPiece];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm(const T* x, const T* weight, float eps, int64_t M, int64_t K, T* out) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    for (int64_t row = blockIdx.x; row < M; row += gridDim.x) {
        const T* const from = x + row * K;
        const float mean = __fdiv_rn(sum_of_squares(from, K, shared), static_cast<float>(K));
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
        for (int64_t k = threadIdx.x; k < K; k += kThreads) {
            const float value = to_float(from_float<T>(__fmul_rn(to_float(from[k]), factor)));
            out[row * K + k] = from_float<T>(__fmul_rn(value, to_float(weight[k])));
        }
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_rms_norm(const hb_rms_norm_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_rms_norm_args& a = *args;
    if (a.M * a.K == 0) return HB_OK;
    with_dtype(a.dtype, [&](auto type) {
        using T = decltype(type);
        launch(rms_norm<T>, blocks_for(a.M, 1), kThreads, (kPiece + 1) * static_cast<int64_t>(sizeof(float)),
               stream_of(a.call), static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
               static_cast<float>(a.eps), a.M, a.K, static_cast<T*>(a.out));
    });
    return launched();
}
