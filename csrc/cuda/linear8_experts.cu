// The 8-bit matmul of rows with the matrices of their experts: the entry, which chooses kernels as linear8.cu does.
// Which rows are whose is found on the device (experts.cuh); nothing is waited for, so that a graph can hold the call.
//
// Workspace: codes, maxima and masks of x | sums over more columns than an int32 holds.
#include "linear8.h"
#include "vocabulary.cuh"

namespace hb {

namespace {

using Layout = Linear8Layout<hb_linear8_experts_args>;

bool has_wide_sums(const hb_linear8_experts_args& a) {
    return a.K > kExactTerms;
}

int64_t workspace_bytes(const hb_linear8_experts_args& a) {
    if (a.M == 0 || a.N == 0 || a.outlier_rule == HB_OUTLIERS_ALL) return 0;
    return Layout(a).sums_at + (has_wide_sums(a) ? a.M * a.N * 8 : 0);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_experts_workspace(const hb_linear8_experts_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_experts_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = workspace_bytes(*args);
    return HB_OK;
}

extern "C" hb_status hb_linear8_experts(const hb_linear8_experts_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear8_experts_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    HB_REQUIRE(check_workspace(a.call, workspace_bytes(a)));
    if (a.outlier_rule != HB_OUTLIERS_ALL) {
        const Layout layout(a);
        const SplitRows rows = layout.rows();
        launch_split(a, rows);
        launch_linear8_experts_mma(a, rows, has_wide_sums(a) ? layout.at<int64_t>(layout.sums_at) : nullptr);
    } else if (a.x_dtype == HB_FLOAT32) {
        launch_linear8_experts_float(a);
    } else {
        launch_linear8_experts_weights(a);
    }
    return launched();
}
