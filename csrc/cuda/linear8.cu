// LLM.int8(): out = x * W^T + bias with W in int8. Three kernels, the simplest that are right.
//
//     mark_columns   only for the batch rule: which columns of x hold an outlier in any row
//     split_rows     one warp per row of x: the largest ordinary value, then int8 codes with zeros for outliers
//     linear8        one warp per output: an exact integer sum, and the outliers in column order. 32 columns are looked
//                    at together; a ballot tells which hold outliers, and these are added one by one, so that the
//                    float32 sum equals the CPU library's bit for bit.
//
// Workspace: codes int8 [M, K] | absmax float [M] | mask uint8 [K], each rounded up to 64 bytes.
#include "int8.cuh"

namespace hb {

namespace {

struct Layout {
    int64_t absmax_at;
    int64_t mask_at;
    int64_t end;

    explicit Layout(const hb_linear8_args& a)
        : absmax_at(round_up(a.M * a.K, HB_WORKSPACE_ALIGNMENT)),
          mask_at(absmax_at + round_up(a.M * 4, HB_WORKSPACE_ALIGNMENT)),
          end(mask_at + round_up(a.K, HB_WORKSPACE_ALIGNMENT)) {}
};

// Which values of x are outliers. mask is null but for the batch rule; no value compares with a NaN threshold.
struct Rule {
    float threshold;
    const uint8_t* mask;
    bool all;

    __device__ bool by_value(float value) const { return all || fabsf(value) >= threshold; }
    __device__ bool holds(float value, int64_t column) const {
        return by_value(value) || (mask != nullptr && mask[column] != 0);
    }
};

template <typename T>
__global__ void mark_columns(const T* x, int64_t M, int64_t K, float threshold, uint8_t* mask) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < K; k += stride) {
        bool any = false;
        for (int64_t row = 0; row < M; ++row) any = any || fabsf(to_float(x[row * K + k])) >= threshold;
        mask[k] = any ? 1 : 0;
    }
}

template <typename T>
__global__ void split_rows(const T* x, int64_t M, int64_t K, Rule rule, int8_t* codes, float* absmax) {
    for (int64_t row = warp_index(); row < M; row += warp_count()) {
        // Ordinary values in an outlier column still count for the maximum, as in bitsandbytes.
        unsigned largest = 0;
        for (int64_t k = lane(); k < K; k += kWarp) {
            const float value = to_float(x[row * K + k]);
            if (!rule.by_value(value)) largest = max(largest, magnitude_bits(value));
        }
        const float row_absmax = largest_in_warp(largest);
        const float factor = int8_factor(row_absmax);
        for (int64_t k = lane(); k < K; k += kWarp) {
            const float value = to_float(x[row * K + k]);
            codes[row * K + k] = rule.holds(value, k) ? static_cast<int8_t>(0) : int8_code(value, factor);
        }
        if (lane() == 0) absmax[row] = row_absmax;
    }
}

template <typename T>
__global__ void linear8(const T* x, const int8_t* x_codes, const float* x_absmax, int64_t M, int64_t N, int64_t K,
                        const int8_t* w_codes, const float* w_absmax, Rule rule, const void* bias, int64_t bias_dtype,
                        T* out) {
    for (int64_t task = warp_index(); task < M * N; task += warp_count()) {
        const int64_t row = task / N;
        const int64_t n = task % N;
        int64_t exact = 0;
        float total = 0;
        bool found = false;
        for (int64_t first = 0; first < K; first += kWarp) {
            const int64_t k = first + lane();
            const bool inside = k < K;
            const int weight = inside ? w_codes[n * K + k] : 0;
            const float value = inside ? to_float(x[row * K + k]) : 0.0f;
            exact += inside ? x_codes[row * K + k] * weight : 0;
            unsigned outliers = __ballot_sync(kAllLanes, inside && rule.holds(value, k));
            found = found || outliers != 0;
            const float term = __fmul_rn(value, static_cast<float>(weight));
            while (outliers != 0) {
                total = __fadd_rn(total, __shfl_sync(kAllLanes, term, __ffs(static_cast<int>(outliers)) - 1));
                outliers &= outliers - 1;
            }
        }
        exact = sum_in_warp(exact);
        if (lane() != 0) continue;
        float result = __fmul_rn(__fmul_rn(static_cast<float>(exact), x_absmax[row]), w_absmax[n]);
        result = __fmul_rn(result, kInt8ProductScale);
        if (found) result = __fadd_rn(result, __fmul_rn(total, __fdiv_rn(w_absmax[n], kInt8Max)));
        if (bias != nullptr) result = __fadd_rn(result, load_float(bias, bias_dtype, n));
        out[row * N + n] = from_float<T>(result);
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_workspace(const hb_linear8_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = Layout(*args).end;
    return HB_OK;
}

extern "C" hb_status hb_linear8(const hb_linear8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear8_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const Layout layout(a);
    HB_REQUIRE(check_workspace(a.call, layout.end));

    char* const base = static_cast<char*>(a.call.workspace);
    int8_t* const codes = reinterpret_cast<int8_t*>(base);
    float* const absmax = reinterpret_cast<float*>(base + layout.absmax_at);
    uint8_t* const mask = reinterpret_cast<uint8_t*>(base + layout.mask_at);
    const float threshold = a.threshold > 0 ? static_cast<float>(a.threshold) : nanf("");
    const bool by_column = a.outlier_rule == HB_OUTLIERS_BATCH;
    const Rule rule = {threshold, by_column ? mask : nullptr, a.outlier_rule == HB_OUTLIERS_ALL};
    constexpr int threads = kWarpsPerBlock * kWarp;
    with_dtype(a.x_dtype, [&](auto type) {
        using T = decltype(type);
        const T* const x = static_cast<const T*>(a.x);
        const cudaStream_t stream = stream_of(a.call);
        if (by_column && a.K > 0) {
            const unsigned blocks = blocks_for_warps(ceil_div(a.K, kWarp));
            launch(mark_columns<T>, blocks, threads, 0, stream, x, a.M, a.K, threshold, mask);
        }
        launch(split_rows<T>, blocks_for_warps(a.M), threads, 0, stream, x, a.M, a.K, rule, codes, absmax);
        launch(linear8<T>, blocks_for_warps(a.M * a.N), threads, 0, stream, x, codes, absmax, a.M, a.N, a.K, a.codes,
               a.absmax, rule, a.bias, a.bias_dtype, static_cast<T*>(a.out));
    });
    return launched();
}
