// The sums of the search for scales with AVX-512: sixteen factors at once, each value's nearest by lookups
// (buckets4.h).
#include "level.h"
#include "search4.h"

#ifdef HB_X86

#include <immintrin.h>

#include "buckets4.h"
#include "halfbyte.h"

namespace hb {

namespace {

// The table's value nearest to a normalised one.
template <typename Ranks>
struct NearestValue {
    Buckets<Ranks> rank_of;
    __m512 values;

    HB_AVX512 NearestValue() { values = values_by_rank<Ranks>(); }

    HB_AVX512 __m512 operator()(__m512 normalised) const {
        const __m512 at_most_1 = _mm512_min_ps(normalised, _mm512_set1_ps(1.0f));
        if (Ranks::kHasSignBit) return _mm512_permutexvar_ps(rank_of(at_most_1), values);
        return _mm512_permutexvar_ps(rank_of(_mm512_max_ps(at_most_1, _mm512_set1_ps(-1.0f))), values);
    }
};

// Sums of `Groups` times sixteen factors over the values of a block.
template <typename Ranks, int Groups>
HB_AVX512 void fit_groups(const float* values, int64_t length, const float* reciprocals, float* products,
                          float* powers) {
    const NearestValue<Ranks> nearest;
    __m512 reciprocal[Groups], sums[Groups], squares[Groups];
    for (int group = 0; group < Groups; ++group) {
        reciprocal[group] = _mm512_loadu_ps(reciprocals + kFactorLanes * group);
        sums[group] = squares[group] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < length; ++i) {
        const __m512 value = _mm512_set1_ps(values[i]);
        for (int group = 0; group < Groups; ++group) {
            const __m512 chosen = nearest(_mm512_mul_ps(value, reciprocal[group]));
            sums[group] = _mm512_add_ps(sums[group], _mm512_mul_ps(value, chosen));
            squares[group] = _mm512_add_ps(squares[group], _mm512_mul_ps(chosen, chosen));
        }
    }
    for (int group = 0; group < Groups; ++group) {
        _mm512_storeu_ps(products + kFactorLanes * group, sums[group]);
        _mm512_storeu_ps(powers + kFactorLanes * group, squares[group]);
    }
}

template <typename Ranks>
HB_AVX512 void fit(const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* out) {
    constexpr int kTogether = 2;  // both signs
    int64_t at = 0;
    for (; at + kTogether * kFactorLanes <= count; at += kTogether * kFactorLanes) {
        fit_groups<Ranks, kTogether>(values, length, reciprocals + at, out->products + at, out->powers + at);
    }
    for (; at < count; at += kFactorLanes) {
        fit_groups<Ranks, 1>(values, length, reciprocals + at, out->products + at, out->powers + at);
    }
}

template <typename Ranks>
HB_AVX512 void errors(const float* values, int64_t length, const float* factors, const float* reciprocals, float* out) {
    const NearestValue<Ranks> nearest;
    const __m512 factor = _mm512_loadu_ps(factors), reciprocal = _mm512_loadu_ps(reciprocals);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; ++i) {
        const __m512 value = _mm512_set1_ps(values[i]);
        const __m512 decoded = _mm512_mul_ps(nearest(_mm512_mul_ps(value, reciprocal)), factor);
        const __m512 difference = _mm512_sub_ps(value, decoded);
        sums = _mm512_add_ps(sums, _mm512_mul_ps(difference, difference));
    }
    _mm512_storeu_ps(out, sums);
}

constexpr SearchSteps kNf4Steps = {fit<Nf4Ranks>, errors<Nf4Ranks>};
constexpr SearchSteps kFp4Steps = {fit<Fp4Ranks>, errors<Fp4Ranks>};

}  // namespace

const SearchSteps* search_steps_avx512(int64_t format) {
    if (!has_avx512()) return nullptr;
    return format == HB_NF4 ? &kNf4Steps : &kFp4Steps;
}

}  // namespace hb

#else

namespace hb {

const SearchSteps* search_steps_avx512(int64_t) {
    return nullptr;
}

}  // namespace hb

#endif
