// out = x * W^T + bias with W in 4 bits: the entries; one product is a group of one. What they run is in decoded.cpp.
#include "checks.h"
#include "decoded.h"
#include "halfbyte.h"

namespace hb {

namespace {

DecodedCall decoded_call(const hb_linear4_args& a) {
    const AbsmaxSource absmax = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    const DecodedWeight weight = {a.packed, a.format, a.blocksize, absmax, false};
    return {a.x, a.x_dtype, a.M, a.N, a.K, weight, a.bias, a.bias_dtype, a.out, a.N, false};
}

}  // namespace

DecodedCalls decoded_calls(const hb_linear4_args* items, int64_t count) {
    DecodedCalls calls{};
    calls.count = count;
    calls.experts = 1;
    for (int64_t i = 0; i < count; ++i) {
        calls.at[i] = decoded_call(items[i]);
        calls.at[i].batch_invariant = items->call.batch_invariant != 0;
    }
    return calls;
}

}  // namespace hb

extern "C" hb_status hb_linear4_group_workspace(const hb_linear4_args* items, int64_t count, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_group(items, count, check_linear4_shape));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = decoded_workspace(decoded_calls(items, count), items->call.threads);
    return HB_OK;
}

extern "C" hb_status hb_linear4_group(const hb_linear4_args* items, int64_t count) {
    using namespace hb;
    HB_REQUIRE(check_group<hb_linear4_args>(items, count, check));
    if (!has_output(items, count)) return HB_OK;
    const DecodedCalls calls = decoded_calls(items, count);
    const hb_call& call = items->call;
    HB_REQUIRE(check_workspace(call, decoded_workspace(calls, call.threads)));
    run_decoded(calls, call.threads, call.workspace);
    return HB_OK;
}

extern "C" hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes) {
    return hb_linear4_group_workspace(args, 1, bytes);
}

extern "C" hb_status hb_linear4(const hb_linear4_args* args) {
    return hb_linear4_group(args, 1);
}
