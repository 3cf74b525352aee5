// The scale of each 4-bit block, of either sign, with the smallest squared error that is found.
//
// A block is divided by its largest magnitude. Every factor that is tried gives each value x its nearest table value q;
// the best scale for those is sum(xq) / sum(qq), which lowers the error by sum(xq)^2 / sum(qq), its gain. First come
// formats.h's factors, then those around the scale that gained most, and the best is taken where its error is below
// that of the largest magnitude itself. Bit-equal to quant/reference.py: sums go over the values in order, a lane per
// factor.
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

// Clones are made of plain functions, hence one of each per format.
HB_CLONES(void, fit_nf4, (const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* fit)) {
    for (int64_t at = 0; at < count; at += kFactorLanes) {
        fit_lanes<Nf4Ranks>(values, length, reciprocals + at, fit->products + at, fit->powers + at);
    }
}
HB_CLONES(void, fit_fp4, (const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* fit)) {
    for (int64_t at = 0; at < count; at += kFactorLanes) {
        fit_lanes<Fp4Ranks>(values, length, reciprocals + at, fit->products + at, fit->powers + at);
    }
}
HB_CLONES(void, errors_nf4,
          (const float* values, int64_t length, const float* factors, const float* reciprocals, float* errors)) {
    add_errors<Nf4Ranks>(values, length, factors, reciprocals, errors);
}
HB_CLONES(void, errors_fp4,
          (const float* values, int64_t length, const float* factors, const float* reciprocals, float* errors)) {
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

float reciprocal_of(float factor) {
    return factor == 0 ? 0.0f : 1.0f / factor;
}

// The scale that gained most so far; 1, the largest magnitude's own, before any did.
struct Best {
    float gain = 0;
    float scale = 1;

    void look_at(const Fit& fit, int count) {
        for (int i = 0; i < count; ++i) {
            const float power = fit.powers[i];
            const float gained = power == 0 ? 0.0f : fit.products[i] * fit.products[i] / power;
            if (!(gained > gain)) continue;
            gain = gained;
            scale = fit.products[i] / power;
        }
    }
};

// For values that are divided by their largest magnitude, in units of it.
float best_scale(const SearchSteps& steps, const float* values, int64_t length, int count) {
    Fit fit;
    Best best;
    steps.fit(values, length, kReciprocals.at, count, &fit);
    best.look_at(fit, count);
    alignas(64) float factors[kFactorLanes], reciprocals[kFactorLanes], errors[kFactorLanes];
    for (int lane = 0; lane < kFactorLanes; ++lane)
        reciprocals[lane] = reciprocal_of(best.scale + kSearchSteps.at[lane]);
    steps.fit(values, length, reciprocals, kFactorLanes, &fit);
    best.look_at(fit, kFactorLanes);
    for (int lane = 0; lane < kFactorLanes; ++lane) {  // two lanes are needed, the others cost nothing
        factors[lane] = lane == 0 ? best.scale : 1.0f;
        reciprocals[lane] = reciprocal_of(factors[lane]);
    }
    steps.errors(values, length, factors, reciprocals, errors);
    return errors[0] < errors[1] - kSearchMargin ? best.scale : 1.0f;
}

// Divides by the largest magnitude, which is returned; magnitudes where only those are searched.
HB_CLONES(float, normalise_block, (float* values, int64_t count, bool magnitudes)) {
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
            const float scale = best_scale(steps, values, length, count) * absmax;
            a.scales[block] = isfinite(scale) ? scale : absmax;
        }
    });
    return HB_OK;
}
