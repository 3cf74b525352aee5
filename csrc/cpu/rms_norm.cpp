// Root mean square normalisation, row by row. The squares go to 16 float32 sums by column modulo 16, which are then
// added in halves, so that a row has the same bits at every instruction set and with any number of threads.
#include <math.h>

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kSums = 16;

template <typename Dtype>
HB_INLINE float sum_of_squares(const typename Dtype::Kept* x, int64_t K) {
    float sums[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= K; k += kSums) {
        for (int64_t j = 0; j < kSums; ++j) sums[j] += Dtype::load(x[k + j]) * Dtype::load(x[k + j]);
    }
    for (int64_t j = 0; k + j < K; ++j) sums[j] += Dtype::load(x[k + j]) * Dtype::load(x[k + j]);
    for (int64_t width = kSums / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

template <typename Dtype>
HB_INLINE void normalise(const hb_rms_norm_args& a, int64_t begin, int64_t end) {
    using Kept = typename Dtype::Kept;
    const Kept* const weight = static_cast<const Kept*>(a.weight);
    for (int64_t row = begin; row < end; ++row) {
        const Kept* const x = static_cast<const Kept*>(a.x) + row * a.K;
        Kept* const out = static_cast<Kept*>(a.out) + row * a.K;
        const float mean = sum_of_squares<Dtype>(x, a.K) / static_cast<float>(a.K);
        const float factor = 1.0f / sqrtf(mean + static_cast<float>(a.eps));
        for (int64_t k = 0; k < a.K; ++k) out[k] = product<Dtype>(Dtype::load(x[k]) * factor, weight[k]);
    }
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_rms_norm(const hb_rms_norm_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_rms_norm_args& a = *args;
    if (a.K == 0) return HB_OK;
    const auto run = for_dtype(a.dtype, Clones<normalise<Float32>>::run, Clones<normalise<Float16>>::run,
                               Clones<normalise<Bfloat16>>::run);
    parallel_for(threads_for(a.call.threads, a.M * a.K), a.M,
                 [&](int64_t, int64_t begin, int64_t end) { run(a, begin, end); });
    return HB_OK;
}
