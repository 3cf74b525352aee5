// The scale of each 4-bit block, of either sign, with the smallest squared error that is found.
//
// A block is divided by its largest magnitude. Every factor of formats.h's search gives each value x its nearest table
// value q; the best scale for those is sum(xq) / sum(qq), which lowers the error by sum(xq)^2 / sum(qq). The factor
// that gains most wins, its best scale is refined once more, and it is taken where its error is below that of the
// largest magnitude itself. Bit-equal to quant/reference.py: sums go over the values in order, one lane per factor.
#include "search4.h"

#include <math.h>

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "pool.h"
#include "ranks4.h"

namespace hb {

namespace {

template <typename Ranks>
HB_INLINE float nearest(float normalised) {
    float chosen = Ranks::value(0);
    for (int rank = 0; rank < Ranks::kThresholds; ++rank) {
        chosen = normalised > Ranks::threshold(rank) ? Ranks::value(rank + 1) : chosen;
    }
    return chosen;
}

template <typename Ranks>
HB_INLINE void fit_lanes(const float* values, int64_t length, const float* reciprocals, float* products,
                         float* powers) {
    float sums[kFactorLanes] = {}, squares[kFactorLanes] = {};
    for (int64_t i = 0; i < length; ++i) {
        for (int lane = 0; lane < kFactorLanes; ++lane) {
            const float chosen = nearest<Ranks>(values[i] * reciprocals[lane]);
            sums[lane] += values[i] * chosen;
            squares[lane] += chosen * chosen;
        }
    }
    for (int lane = 0; lane < kFactorLanes; ++lane) products[lane] = sums[lane], powers[lane] = squares[lane];
}

template <typename Ranks>
HB_INLINE void add_errors(const float* values, int64_t length, const float* factors, const float* reciprocals,
                          float* errors) {
    float sums[kFactorLanes] = {};
    for (int64_t i = 0; i < length; ++i) {
        for (int lane = 0; lane < kFactorLanes; ++lane) {
            const float difference = values[i] - nearest<Ranks>(values[i] * reciprocals[lane]) * factors[lane];
            sums[lane] += difference * difference;
        }
    }
    for (int lane = 0; lane < kFactorLanes; ++lane) errors[lane] = sums[lane];
}

// Clones are made of plain functions only, hence one of each per format.
HB_CLONES void fit_nf4(const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* fit) {
    for (int64_t at = 0; at < count; at += kFactorLanes) {
        fit_lanes<Nf4Ranks>(values, length, reciprocals + at, fit->products + at, fit->powers + at);
    }
}
HB_CLONES void fit_fp4(const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* fit) {
    for (int64_t at = 0; at < count; at += kFactorLanes) {
        fit_lanes<Fp4Ranks>(values, length, reciprocals + at, fit->products + at, fit->powers + at);
    }
}
HB_CLONES void errors_nf4(const float* values, int64_t length, const float* factors, const float* reciprocals,
                          float* errors) {
    add_errors<Nf4Ranks>(values, length, factors, reciprocals, errors);
}
HB_CLONES void errors_fp4(const float* values, int64_t length, const float* factors, const float* reciprocals,
                          float* errors) {
    add_errors<Fp4Ranks>(values, length, factors, reciprocals, errors);
}

constexpr SearchSteps kNf4Steps = {fit_nf4, errors_nf4};
constexpr SearchSteps kFp4Steps = {fit_fp4, errors_fp4};

const SearchSteps& search_steps(int64_t format) {
    const SearchSteps* const wide = search_steps_avx512(format);
    if (wide != nullptr) return *wide;
    return format == HB_NF4 ? kNf4Steps : kFp4Steps;
}

constexpr Table<float, kMostFactors> make_reciprocals() {
    Table<float, kMostFactors> reciprocals{};
    for (int i = 0; i < kMostFactors; ++i) reciprocals.at[i] = 1.0f / kSearchFactors.at[i];
    return reciprocals;
}
constexpr Table<float, kMostFactors> kReciprocals = make_reciprocals();

// A factor and its reciprocal, which is 0 where there is none, in every lane.
struct Lanes {
    alignas(64) float factors[kFactorLanes];
    alignas(64) float reciprocals[kFactorLanes];

    explicit Lanes(float factor) {
        for (int lane = 0; lane < kFactorLanes; ++lane) {
            factors[lane] = factor;
            reciprocals[lane] = factor == 0 ? 0.0f : 1.0f / factor;
        }
    }
};

// The factor with the smallest error for values that are divided by their largest magnitude; 1 is that magnitude's own.
float best_factor(const SearchSteps& steps, const float* values, int64_t length, int count) {
    Fit fit;
    steps.fit(values, length, kReciprocals.at, count, &fit);
    float best_gain = 0, found = 1;
    for (int i = 0; i < count; ++i) {
        const float power = fit.powers[i];
        const float gain = power == 0 ? 0.0f : fit.products[i] * fit.products[i] / power;
        if (!(gain > best_gain)) continue;
        best_gain = gain;
        found = fit.products[i] / power;
    }
    steps.fit(values, length, Lanes(found).reciprocals, kFactorLanes, &fit);
    if (fit.powers[0] > 0) found = fit.products[0] / fit.powers[0];
    Lanes lanes(found);
    lanes.factors[1] = lanes.reciprocals[1] = 1.0f;
    float errors[kFactorLanes];
    steps.errors(values, length, lanes.factors, lanes.reciprocals, errors);
    return errors[0] < errors[1] - kSearchMargin ? found : 1.0f;
}

// Divides by the largest magnitude, which is returned; magnitudes where only those are searched.
HB_CLONES float normalise_block(float* values, int64_t count, bool magnitudes) {
    const float absmax = largest_magnitude(values, count);
    const Normaliser normalise(absmax);
    for (int64_t i = 0; i < count; ++i) values[i] = normalise(values[i]);
    if (magnitudes) {
        for (int64_t i = 0; i < count; ++i) values[i] = fabsf(values[i]);
    }
    return absmax;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_search4(const hb_search4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_search4_args& a = *args;
    const bool has_sign_bit = a.format == HB_FP4;
    const int count = has_sign_bit ? kSearchCount : kMostFactors;
    const SearchSteps& steps = search_steps(a.format);
    const int64_t blocks = ceil_div(a.n, a.blocksize);
    parallel_for(threads_for(a.call.threads, a.n * count), blocks, [&](int64_t, int64_t begin, int64_t end) {
        float values[kLargestBlocksize];
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * a.blocksize;
            const int64_t length = first + a.blocksize <= a.n ? a.blocksize : a.n - first;
            load_floats(a.x, a.x_dtype, first, length, values);
            const float absmax = normalise_block(values, length, has_sign_bit);
            const float scale = best_factor(steps, values, length, count) * absmax;
            a.scales[block] = isfinite(scale) ? scale : absmax;
        }
    });
    return HB_OK;
}
