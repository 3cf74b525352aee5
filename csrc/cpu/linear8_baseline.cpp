// LLM.int8() in portable C++.
#include "linear8_kernel.h"

namespace hb {

namespace {

struct Baseline8 {
    struct Codes {
        const uint8_t* at;
    };
    struct Weights {
        const int8_t* at;
    };
    using Sum = int32_t;
    static constexpr int64_t kGroup = 16;
    static constexpr int kRows = 1;
    static constexpr int kOffset = 0;

    static HB_INLINE Codes load_codes(const uint8_t* codes) { return {codes}; }
    static HB_INLINE Weights load_weights(const int8_t* weights) { return {weights}; }
    static HB_INLINE Sum dot(Sum sum, Codes codes, Weights weights) {
        for (int i = 0; i < kGroup; ++i) {
            sum += static_cast<int16_t>(static_cast<int8_t>(codes.at[i])) * static_cast<int16_t>(weights.at[i]);
        }
        return sum;
    }
    static HB_INLINE void totals(const Sum* sums, int32_t* out) { memcpy(out, sums, kQuad * sizeof *out); }
    static HB_INLINE uint64_t outliers(const float* values, int64_t count, float threshold) {
        return outliers_one_by_one(values, count, threshold);
    }
};

}  // namespace

const Kernels8 kLinear8Baseline = linear8_kernels<Baseline8>();

}  // namespace hb
