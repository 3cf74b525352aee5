// out = x * W^T + bias with W in 4 bits: the entry, and the kernel for what linear4_mma.cu and linear4_hopper.cu do not
// take: float32, whose sums stay float32, and any K. It never builds the weight.
//
// One warp makes the outputs of one weight row for up to eight rows of x (linear4_warp.cuh). Nothing that decides
// between the kernels is a matter of x's rows.
#include "linear4_hopper.h"
#include "linear4_mma.h"
#include "linear4_warp.cuh"

namespace hb {

namespace {

// Whether the caller wants the kernel for Hopper where it can be had.
bool wants_hopper(const hb_linear4_args& a) {
    return a.call.cuda_kernel == HB_CUDA_HOPPER && mma_takes(a);
}

int64_t workspace_bytes(const hb_linear4_args& a) {
    if (wants_hopper(a)) return hopper_workspace_bytes(a.M, a.N, a.K);
    return mma_takes(a) ? plan_linear4(a).workspace_bytes(a.M, a.N) : 0;
}

template <typename T>
__global__ void linear4(const T* x, int64_t M, int64_t N, int64_t K, const uint8_t* packed, int64_t format,
                        int64_t blocksize, Absmax absmax, const void* bias, int64_t bias_dtype, T* out) {
    const WarpWeight weight = {packed, format, blocksize, absmax};
    const int64_t row_groups = (M + kWarpRows - 1) / kWarpRows;
    for (int64_t task = warp_index(); task < N * row_groups; task += warp_count()) {
        const int64_t n = task % N;
        const int64_t first_row = task / N * kWarpRows;
        const int64_t rows = M - first_row < kWarpRows ? M - first_row : kWarpRows;
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, n);
        multiply_weight_row(x + first_row * K, rows, K, weight, n, add, out + first_row * N + n, N);
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = workspace_bytes(*args);
    return HB_OK;
}

extern "C" hb_status hb_linear4(const hb_linear4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_args& a = *args;
    if (a.call.cuda_kernel == HB_CUDA_HOPPER) HB_REQUIRE(check_hopper());
    if (a.M == 0 || a.N == 0) return HB_OK;
    HB_REQUIRE(check_workspace(a.call, workspace_bytes(a)));
    if (mma_takes(a) && reinterpret_cast<uintptr_t>(a.packed) % 16 == 0) {
        if (wants_hopper(a)) {
            launch_linear4_hopper(a);
        } else {
            launch_linear4_mma(a, plan_linear4(a));
        }
        return launched();
    }
    const Absmax absmax = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    const unsigned blocks = blocks_for_warps(a.N * ceil_div(a.M, kWarpRows));
    with_dtype(a.x_dtype, [&](auto type) {
        using T = decltype(type);
        launch(linear4<T>, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const T*>(a.x), a.M, a.N,
               a.K, a.packed, a.format, a.blocksize, absmax, a.bias, a.bias_dtype, static_cast<T*>(a.out));
    });
    return launched();
}
