// What the kernels of the 8-bit matmul share: the workspace, and how each is launched. Plain host code.
#pragma once

#include <math.h>

#include "experts_plan.h"
#include "linear8_plan.h"

namespace hb {

constexpr int kWordColumns = 32;  // columns of x in a word of a mask: column k is bit k % 32 of word k / 32

// x as LLM.int8() takes it apart, in the workspace.
struct SplitRows {
    int64_t stride;   // of a row of codes: K rounded up to whole stages
    int8_t* codes;    // [M, stride] zeros for outliers and behind K
    float* absmax;    // [M] of the ordinary values
    unsigned* found;  // [M] 1: the row has outliers; null, as what follows, where none are looked for
    unsigned* masks;  // [M, stride / 32] each row's outliers
    bool by_column;   // the batch rule: rows that belong together have the same masks, and all values count there
    float threshold;  // NaN where no outliers are looked for: no value compares with it
};

// Where these begin in the workspace, in bytes; then come sums. `Args`: of one weight, or of experts.
template <typename Args>
struct Linear8Layout {
    const Args& a;
    bool outliers;
    int64_t stride;
    int64_t absmax_at, found_at, masks_at, sums_at;

    explicit Linear8Layout(const Args& args)
        : a(args),
          outliers(a.threshold > 0),
          stride(round_up(a.K, kSliceStep)),
          absmax_at(padded(a.M * stride)),
          found_at(absmax_at + padded(a.M * 4)),
          masks_at(found_at + (outliers ? padded(a.M * 4) : 0)),
          sums_at(masks_at + (outliers ? padded(a.M * stride / 8) : 0)) {}

    SplitRows rows() const {
        return {stride,
                at<int8_t>(0),
                at<float>(absmax_at),
                outliers ? at<unsigned>(found_at) : nullptr,
                outliers ? at<unsigned>(masks_at) : nullptr,
                outliers && a.outlier_rule == HB_OUTLIERS_BATCH && a.K > 0,
                outliers ? static_cast<float>(a.threshold) : NAN};
    }

    template <typename T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(a.call.workspace) + offset);
    }

  private:
    static int64_t padded(int64_t bytes) { return round_up(bytes, HB_WORKSPACE_ALIGNMENT); }
};

// x into codes, maxima and masks. Under the batch rule rows of one expert belong together, or all rows (no `ends`).
void launch_split(const hb_linear8_args& a, const SplitRows& rows);
void launch_split(const hb_linear8_experts_args& a, const SplitRows& rows);

// The product of what that left; `slices`, of plan_int8_products, is workspace for plan.workspace_bytes.
void launch_linear8_mma(const hb_linear8_args& a, const SplitRows& rows, const MatmulPlan& plan, int* slices);

// With the weights of experts. `wide`: room for M * N sums over more columns than an int32 holds, or null.
void launch_linear8_experts_mma(const hb_linear8_experts_args& a, const SplitRows& rows, int64_t* wide);

// Where no activation is rounded: x in float32, and in 16 bits with the workspace of plan_int8_weights.
void launch_linear8_float(const hb_linear8_args& a);
void launch_linear8_weights(const hb_linear8_args& a, const MatmulPlan& plan);
void launch_linear8_experts_float(const hb_linear8_experts_args& a);
void launch_linear8_experts_weights(const hb_linear8_experts_args& a);

}  // namespace hb
