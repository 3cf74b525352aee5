// out = x * W^T + bias with W in 4 bits: the entry. What it runs is in decoded.cpp.
#include "checks.h"
#include "decoded.h"
#include "halfbyte.h"

namespace hb {

namespace {

DecodedCall decoded_call(const hb_linear4_args& a) {
    const AbsmaxSource absmax = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    const DecodedWeight weight = {a.packed, a.format, a.blocksize, absmax};
    return {a.x, a.x_dtype, a.M, a.N, a.K, weight, a.bias, a.bias_dtype, a.out};
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = decoded_workspace(decoded_call(*args), false, args->call.threads);
    return HB_OK;
}

extern "C" hb_status hb_linear4(const hb_linear4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    if (args->M == 0 || args->N == 0) return HB_OK;
    const DecodedCall call = decoded_call(*args);
    HB_REQUIRE(check_workspace(args->call, decoded_workspace(call, false, args->call.threads)));
    run_decoded(call, false, args->call.threads, args->call.workspace);
    return HB_OK;
}
