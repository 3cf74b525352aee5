// out = x * W^T + bias with W in int8 and x in float32, which no tensor core multiplies: sums stay float32.
//
// One warp makes the outputs of one weight row n for up to eight rows of x:
//
//     lane l:  k = l, l+32, l+64, ...     sums[r] += x[r, k] * codes[n, k]
//     warp:    sums added over the lanes in one fixed order, scaled, bias added
//
// A sum does not depend on M or on the row's place in the eight, so a row's result is the same in every batch. Weights
// are read once per eight rows.
#include "int8.cuh"
#include "linear8.h"

namespace hb {

namespace {

constexpr int kRows = 8;

__global__ void linear8_float(const float* x, int64_t M, int64_t N, int64_t K, const int8_t* codes, const float* absmax,
                              const void* bias, int64_t bias_dtype, float* out) {
    const int64_t row_groups = (M + kRows - 1) / kRows;
    for (int64_t task = warp_index(); task < N * row_groups; task += warp_count()) {
        const int64_t n = task % N;
        const int64_t first_row = task / N * kRows;
        const int64_t rows = M - first_row < kRows ? M - first_row : kRows;

        float sums[kRows] = {};
        for (int64_t k = lane(); k < K; k += kWarp) {
            const float code = static_cast<float>(codes[n * K + k]);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (r < rows) sums[r] = __fmaf_rn(x[(first_row + r) * K + k], code, sums[r]);
            }
        }
        const float scale = int8_scale(absmax[n]);
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, n);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float sum = __fmul_rn(sum_in_warp(sums[r]), scale);
            if (r < rows && lane() == 0) out[(first_row + r) * N + n] = __fadd_rn(sum, add);
        }
    }
}

}  // namespace

void launch_linear8_float(const hb_linear8_args& a) {
    const unsigned blocks = blocks_for_warps(a.N * ceil_div(a.M, kRows));
    launch(linear8_float, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const float*>(a.x), a.M,
           a.N, a.K, a.codes, a.absmax, a.bias, a.bias_dtype, static_cast<float*>(a.out));
}

}  // namespace hb
