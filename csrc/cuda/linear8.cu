// The 8-bit matmul: the entry, which chooses kernels by the outlier rule. None of the choices depends on x's rows.
//
//     value, batch    LLM.int8(): linear8_split.cu takes x apart, linear8_mma.cu multiplies
//     all             no activation is rounded: linear8_weights.cu, or linear8_float.cu for float32
//
// Workspace: codes, maxima and masks of x | sums of slices.
#include "linear8.h"
#include "vocabulary.cuh"

namespace hb {

namespace {

int64_t workspace_bytes(const hb_linear8_args& a) {
    if (a.M == 0 || a.N == 0) return 0;
    if (a.outlier_rule != HB_OUTLIERS_ALL) {
        return Linear8Layout<hb_linear8_args>(a).sums_at + plan_int8_products(a.M, a.N, a.K).workspace_bytes(a.M, a.N);
    }
    return a.x_dtype == HB_FLOAT32 ? 0 : plan_int8_weights(a.M, a.N, a.K).workspace_bytes(a.M, a.N);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_workspace(const hb_linear8_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = workspace_bytes(*args);
    return HB_OK;
}

extern "C" hb_status hb_linear8(const hb_linear8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear8_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    HB_REQUIRE(check_workspace(a.call, workspace_bytes(a)));
    if (a.outlier_rule != HB_OUTLIERS_ALL) {
        const Linear8Layout<hb_linear8_args> layout(a);
        const SplitRows rows = layout.rows();
        launch_split(a, rows);
        launch_linear8_mma(a, rows, plan_int8_products(a.M, a.N, a.K), layout.at<int>(layout.sums_at));
    } else if (a.x_dtype == HB_FLOAT32) {
        launch_linear8_float(a);
    } else {
        launch_linear8_weights(a, plan_int8_weights(a.M, a.N, a.K));
    }
    return launched();
}
