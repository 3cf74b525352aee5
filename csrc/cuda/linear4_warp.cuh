// The 4-bit matmul without tensor cores, for any x and any K: what one warp does. No kernels.
//
// One warp makes the outputs of one weight row n for up to eight rows of x:
//
//     lane l:  k = l, l+32, l+64, ...     weight = table[code(n*K + k)] * absmax     sums[r] += x[r, k] * weight
//     warp:    sums added over the lanes in one fixed order, bias added, rounded once
//
// A sum does not depend on the number of rows or on the row's place in the eight, so a row's result is the same in
// every batch. Weights are read once per eight rows.
#pragma once

#include "vocabulary.cuh"

namespace hb {

constexpr int kWarpRows = 8;

struct WarpWeight {
    const uint8_t* packed;
    int64_t format;
    int64_t blocksize;
    Absmax absmax;
};

// Weight row n against `rows` rows of x, 1 to kWarpRows, `add` on top -> out[r * out_stride].
template <typename T>
__device__ void multiply_weight_row(const T* x, int64_t rows, int64_t K, const WarpWeight& weight, int64_t n, float add,
                                    T* out, int64_t out_stride) {
    float sums[kWarpRows] = {};
    for (int64_t k = lane(); k < K; k += kWarp) {
        const int64_t index = n * K + k;
        const float code = code_value(weight.format, code_at(weight.packed, index));
        const float value = __fmul_rn(code, weight.absmax.of(index / weight.blocksize));
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            if (r < rows) sums[r] = __fmaf_rn(to_float(x[r * K + k]), value, sums[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        const float sum = sum_in_warp(sums[r]);
        if (r < rows && lane() == 0) out[r * out_stride] = from_float<T>(__fadd_rn(sum, add));
    }
}

}  // namespace hb
