// out = x * W^T + bias with W in int8 and x in float32, which no tensor core multiplies: sums stay float32. For one W,
// and for those of experts.
//
// One warp makes the outputs of one weight row n for up to eight rows of x:
//
//     lane l:  k = l, l+32, l+64, ...     sums[r] += x[r, k] * codes[n, k]
//     warp:    sums added over the lanes in one fixed order, scaled, bias added
//
// A sum does not depend on M or on the row's place in the eight, so a row's result is the same in every batch. Weights
// are read once per eight rows.
#include "experts.cuh"
#include "int8.cuh"
#include "linear8.h"

namespace hb {

namespace {

constexpr int kRows = 8;

// Weight row `codes`, whose maximum is `absmax`, against `rows` rows of x, 1 to kRows, -> out[r * stride].
__device__ void multiply_row(const float* x, int64_t rows, int64_t K, const int8_t* codes, float absmax, float add,
                             float* out, int64_t stride) {
    float sums[kRows] = {};
    for (int64_t k = lane(); k < K; k += kWarp) {
        const float code = static_cast<float>(codes[k]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r < rows) sums[r] = __fmaf_rn(x[r * K + k], code, sums[r]);
        }
    }
    const float scale = int8_scale(absmax);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const float sum = __fmul_rn(sum_in_warp(sums[r]), scale);
        if (r < rows && lane() == 0) out[r * stride] = __fadd_rn(sum, add);
    }
}

__global__ void linear8_float(const float* x, int64_t M, int64_t N, int64_t K, const int8_t* codes, const float* absmax,
                              const void* bias, int64_t bias_dtype, float* out) {
    const int64_t row_groups = (M + kRows - 1) / kRows;
    for (int64_t task = warp_index(); task < N * row_groups; task += warp_count()) {
        const int64_t n = task % N;
        const int64_t first_row = task / N * kRows;
        const int64_t rows = M - first_row < kRows ? M - first_row : kRows;
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, n);
        multiply_row(x + first_row * K, rows, K, codes + n * K, absmax[n], add, out + first_row * N + n, N);
    }
}

// The same for one tile of an expert's rows.
__global__ void linear8_experts_float(const float* x, int64_t N, int64_t K, const int8_t* codes, const float* absmax,
                                      ExpertRows experts, int64_t token_tiles, const void* bias, int64_t bias_dtype,
                                      float* out) {
    for (int64_t task = warp_index(); task < N * token_tiles; task += warp_count()) {
        const int64_t n = task % N;
        const ExpertTile tile = find_expert_tile(experts, kRows, task / N);
        float* const to = out + tile.first * N + n;
        if (tile.rows == 0) continue;
        if (tile.expert == experts.count) {
            if (lane() < tile.rows) to[lane() * N] = 0.0f;
            continue;
        }
        const int64_t row = tile.expert * N + n;
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, row);
        multiply_row(x + tile.first * K, tile.rows, K, codes + row * K, absmax[row], add, to, N);
    }
}

}  // namespace

void launch_linear8_float(const hb_linear8_args& a) {
    const unsigned blocks = blocks_for_warps(a.N * ceil_div(a.M, kRows));
    launch(linear8_float, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const float*>(a.x), a.M,
           a.N, a.K, a.codes, a.absmax, a.bias, a.bias_dtype, static_cast<float*>(a.out));
}

void launch_linear8_experts_float(const hb_linear8_experts_args& a) {
    const int64_t token_tiles = most_expert_tiles(a.M, a.E, kRows);
    launch(linear8_experts_float, blocks_for_warps(a.N * token_tiles), kWarpsPerBlock * kWarp, 0, stream_of(a.call),
           static_cast<const float*>(a.x), a.N, a.K, a.codes, a.absmax, ExpertRows{a.ends, a.E, a.M}, token_tiles,
           a.bias, a.bias_dtype, static_cast<float*>(a.out));
}

}  // namespace hb
