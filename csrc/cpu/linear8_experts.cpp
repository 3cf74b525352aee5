// The 8-bit matmul of rows with the matrices of their experts: the entry. Without rounded activations it runs what
// decoded.cpp has for experts; LLM.int8() takes one expert's rows after the other's, each on all threads.
#include "checks.h"
#include "decoded.h"
#include "experts.h"
#include "halfbyte.h"

namespace hb {

namespace {

DecodedCalls decoded_calls(const hb_linear8_experts_args& a) {
    const AbsmaxSource absmax = {a.absmax, nullptr, nullptr, 1};
    const DecodedWeight weight = {reinterpret_cast<const uint8_t*>(a.codes), 0, a.K, absmax, true};
    DecodedCalls calls{};
    calls.at[0] = {
        a.x, a.x_dtype, a.M, a.N, a.K, weight, a.bias, a.bias_dtype, a.out, a.N, a.call.batch_invariant != 0};
    calls.count = 1;
    calls.ends = a.ends;
    calls.experts = a.E;
    calls.strides = {a.N * a.K, a.N, 0, 0, a.N};
    return calls;
}

// Rows [first, first + rows) with the matrix of one expert.
hb_linear8_args call_of(const hb_linear8_experts_args& a, int64_t expert, int64_t first, int64_t rows) {
    const int64_t bytes = dtype_bytes(a.x_dtype);
    hb_linear8_args own{};
    own.call = a.call;
    own.call.struct_bytes = sizeof own;
    own.x_dtype = a.x_dtype, own.M = rows, own.N = a.N, own.K = a.K;
    own.threshold = a.threshold, own.outlier_rule = a.outlier_rule, own.bias_dtype = a.bias_dtype;
    if (a.x != nullptr) own.x = static_cast<const char*>(a.x) + first * a.K * bytes;
    if (a.codes != nullptr) own.codes = a.codes + expert * a.N * a.K;
    if (a.absmax != nullptr) own.absmax = a.absmax + expert * a.N;
    if (a.bias != nullptr) own.bias = static_cast<const char*>(a.bias) + expert * a.N * dtype_bytes(a.bias_dtype);
    if (a.out != nullptr) own.out = static_cast<char*>(a.out) + first * a.N * bytes;
    return own;
}

hb_status run_int8(const hb_linear8_experts_args& a) {
    for (int64_t e = 0, begin = 0; e < a.E; begin = a.ends[e++]) {
        if (a.ends[e] == begin) continue;
        const hb_linear8_args own = call_of(a, e, begin, a.ends[e] - begin);
        HB_REQUIRE(hb_linear8(&own));
    }
    return HB_OK;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_experts_workspace(const hb_linear8_experts_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_experts_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    if (args->outlier_rule != HB_OUTLIERS_ALL) {
        const hb_linear8_args most = call_of(*args, 0, 0, args->M);  // the more rows, the more room
        return hb_linear8_workspace(&most, bytes);
    }
    *bytes = decoded_workspace(decoded_calls(*args), args->call.threads);
    return HB_OK;
}

extern "C" hb_status hb_linear8_experts(const hb_linear8_experts_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear8_experts_args& a = *args;
    HB_REQUIRE(check_ends(a));
    if (a.M == 0 || a.N == 0) return HB_OK;
    int64_t needed = 0;
    HB_REQUIRE(hb_linear8_experts_workspace(args, &needed));
    HB_REQUIRE(check_workspace(a.call, needed));
    if (a.outlier_rule == HB_OUTLIERS_ALL) {
        run_decoded(decoded_calls(a), a.call.threads, a.call.workspace);
    } else {
        HB_REQUIRE(run_int8(a));
    }
    clear_rows_of_nobody(a, a.N);
    return HB_OK;
}
