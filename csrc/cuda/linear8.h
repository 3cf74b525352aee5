// What the kernels of the 8-bit matmul share: the workspace, and how each is launched. Plain host code.
#pragma once

#include <math.h>

#include "linear8_plan.h"

namespace hb {

constexpr int kWordColumns = 32;  // columns of x in a word of a mask: column k is bit k % 32 of word k / 32

// x as LLM.int8() takes it apart, in the workspace.
struct SplitRows {
    int64_t stride;    // of a row of codes: K rounded up to whole stages
    int8_t* codes;     // [M, stride] zeros for outliers and behind K
    float* absmax;     // [M] of the ordinary values
    unsigned* found;   // [M] 1: the row has outliers; null, as what follows, where none are looked for
    unsigned* masks;   // [M, stride / 32] each row's outliers by value
    unsigned* joined;  // [stride / 32] for the batch rule: columns with an outlier in any row; else null
    float threshold;   // NaN where no outliers are looked for: no value compares with it
};

// Where these begin in the workspace, in bytes; then come the sums of slices.
struct Linear8Layout {
    bool outliers;
    bool by_column;
    int64_t stride;
    int64_t absmax_at = 0, found_at = 0, masks_at = 0, joined_at = 0, slices_at = 0;

    explicit Linear8Layout(const hb_linear8_args& a)
        : outliers(a.threshold > 0),
          by_column(outliers && a.outlier_rule == HB_OUTLIERS_BATCH && a.K > 0),
          stride(round_up(a.K, kSliceStep)),
          absmax_at(padded(a.M * stride)),
          found_at(absmax_at + padded(a.M * 4)),
          masks_at(found_at + (outliers ? padded(a.M * 4) : 0)),
          joined_at(masks_at + (outliers ? padded(a.M * stride / 8) : 0)),
          slices_at(joined_at + (by_column ? padded(stride / 8) : 0)) {}

    SplitRows rows(const hb_linear8_args& a) const {
        char* const base = static_cast<char*>(a.call.workspace);
        const auto words_at = [&](bool there, int64_t at) {
            return there ? reinterpret_cast<unsigned*>(base + at) : nullptr;
        };
        return {stride,
                reinterpret_cast<int8_t*>(base),
                reinterpret_cast<float*>(base + absmax_at),
                words_at(outliers, found_at),
                words_at(outliers, masks_at),
                words_at(by_column, joined_at),
                outliers ? static_cast<float>(a.threshold) : NAN};
    }

  private:
    static int64_t padded(int64_t bytes) { return round_up(bytes, HB_WORKSPACE_ALIGNMENT); }
};

// x into codes, maxima and masks.
void launch_split(const hb_linear8_args& a, const SplitRows& rows);

// The product of what that left; `slices`, of plan_int8_products, is workspace for plan.workspace_bytes.
void launch_linear8_mma(const hb_linear8_args& a, const SplitRows& rows, const Linear8Plan& plan, int* slices);

// Where no activation is rounded: x in float32, and in 16 bits with the workspace of plan_int8_weights.
void launch_linear8_float(const hb_linear8_args& a);
void launch_linear8_weights(const hb_linear8_args& a, const Linear8Plan& plan);

}  // namespace hb
