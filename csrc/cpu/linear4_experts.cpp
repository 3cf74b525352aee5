// The 4-bit matmul of rows with the matrices of their experts: the entry. What it runs is in decoded.cpp, where the
// matrices of an expert are calls that share its rows of x.
#include "checks.h"
#include "decoded.h"
#include "experts.h"
#include "halfbyte.h"

namespace hb {

namespace {

MatrixStrides strides_of(const hb_linear4_experts_args& a) {
    const int64_t blocks = ceil_div(a.N * a.K, a.blocksize);
    const int64_t nested_blocks = a.nested_absmax == nullptr ? 0 : ceil_div(blocks, a.nested_blocksize);
    return {a.packed_bytes, blocks, nested_blocks, 1, a.N};
}

DecodedCalls decoded_calls(const hb_linear4_experts_args& a) {
    const AbsmaxSource absmax = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    const DecodedWeight weight = {a.packed, a.format, a.blocksize, absmax, false};
    const bool is_invariant = a.call.batch_invariant != 0;
    const DecodedCall first = {a.x,    a.x_dtype,    a.M,   a.N,       a.K,         weight,
                               a.bias, a.bias_dtype, a.out, a.P * a.N, is_invariant};
    DecodedCalls calls{};
    calls.count = a.P;
    calls.ends = a.ends;
    calls.experts = a.E;
    calls.strides = strides_of(a);
    for (int64_t p = 0; p < a.P; ++p) {
        calls.at[p] = moved(first, calls.strides, p);
        if (a.out != nullptr) calls.at[p].out = static_cast<char*>(a.out) + p * a.N * dtype_bytes(a.x_dtype);
    }
    return calls;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear4_experts_workspace(const hb_linear4_experts_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_experts_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = decoded_workspace(decoded_calls(*args), args->call.threads);
    return HB_OK;
}

extern "C" hb_status hb_linear4_experts(const hb_linear4_experts_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_experts_args& a = *args;
    HB_REQUIRE(check_ends(a));
    if (a.M == 0 || a.N == 0) return HB_OK;
    const DecodedCalls calls = decoded_calls(a);
    HB_REQUIRE(check_workspace(a.call, decoded_workspace(calls, a.call.threads)));
    run_decoded(calls, a.call.threads, a.call.workspace);
    clear_rows_of_nobody(a, a.P * a.N);
    return HB_OK;
}
