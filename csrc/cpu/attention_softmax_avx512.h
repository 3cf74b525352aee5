// The softmax of attention for CPUs with AVX-512: scores of one query vector over a tile of keys become weights, and
// what was summed up so far follows a larger maximum. Shared by the inner parts on vectors and on tiles; see
// attention.h.
//
// Everything is in an unnamed namespace: each file that includes it is compiled for what it needs.
#pragma once

#include "attention.h"
#include "halfbyte.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>
#include <math.h>

namespace hb::attention {

namespace {

// 2^x = 2^n * (1 + r * q), n an integer.
struct Power {
    __m512 n, r, q;
};

HB_AVX512 inline Power split_power(__m512 x) {
    const __m512 magic = _mm512_set1_ps(kRoundToInteger);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 q = _mm512_set1_ps(kExp2[5]);
    for (int i = 4; i >= 0; --i) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExp2[i]));
    return {n, r, q};
}

// 2^x for x <= 0, NaN for NaN; zero where a normal float would end.
HB_AVX512 inline __m512 exp2_of(__m512 x) {
    const Power power = split_power(x);
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallestPower), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(kept, _mm512_fmadd_ps(power.q, power.r, _mm512_set1_ps(1.0f)), power.n);
}

// cap * tanh(x / (2 log2 e)), from 2^x - 1, which keeps its digits near zero.
HB_AVX512 inline __m512 cap_of(__m512 x, float cap) {
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(kTanhIsOne), _mm512_abs_ps(x));
    const Power power = split_power(size);
    const __m512 scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), power.n);
    const __m512 fraction = _mm512_mul_ps(power.q, power.r);
    const __m512 less_one = _mm512_fmadd_ps(scale, fraction, _mm512_sub_ps(scale, _mm512_set1_ps(1.0f)));
    const __m512 tanh = _mm512_div_ps(less_one, _mm512_add_ps(less_one, _mm512_set1_ps(2.0f)));
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
    const __m512 capped = _mm512_mul_ps(tanh, _mm512_set1_ps(cap));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(capped), sign));
}

// To nearest, ties to even, still as float32. A NaN that comes from bfloat16 values stays one.
HB_AVX512 inline __m512i round_to_bfloat(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
}

// A larger maximum: what was summed up so far shrinks.
HB_AVX512 inline void rescale(const Shape& shape, const Block& block, int64_t vector, float maximum) {
    const __m512 factor = exp2_of(_mm512_set1_ps(block.maxima[vector] - maximum));
    float* const sums = block.sums + vector * kLanes;
    _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), factor));
    float* const outputs = block.outputs + vector * shape.padded_e;
    for (int64_t e = 0; e < shape.padded_e; e += kLanes) {
        _mm512_storeu_ps(outputs + e, _mm512_mul_ps(_mm512_loadu_ps(outputs + e), factor));
    }
    block.maxima[vector] = maximum;
}

// Sums of products -> weights against the running maximum, in place, times the values' scales in int8; as bfloat16 in
// the first half if they are wanted in pairs.
template <bool ArePairs>
HB_AVX512 inline void weigh(const Shape& shape, const Block& block, int64_t vector, float* row) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i begin = _mm512_set1_epi32(static_cast<int32_t>(block.begin[vector]));
    const __m512i end = _mm512_set1_epi32(static_cast<int32_t>(block.end[vector]));
    __m512 scores[kTileLanes];
    __mmask16 seen[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        scores[j] = _mm512_loadu_ps(row + j * kLanes);
        if (block.scales != nullptr) {
            scores[j] = _mm512_mul_ps(scores[j], _mm512_loadu_ps(block.scales->keys + j * kLanes));
        }
        scores[j] = _mm512_mul_ps(scores[j], _mm512_set1_ps(shape.scale));
        if (shape.is_capped) scores[j] = cap_of(scores[j], shape.cap);
        const __m512i place = _mm512_add_epi32(places, _mm512_set1_epi32(static_cast<int32_t>(j * kLanes)));
        seen[j] = _mm512_cmpge_epi32_mask(place, begin) & _mm512_cmplt_epi32_mask(place, end);
        scores[j] = _mm512_mask_mov_ps(nothing, seen[j], scores[j]);
    }
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3])));
    if (!(largest <= block.maxima[vector])) rescale(shape, block, vector, largest);
    // A vector that has seen nothing yet keeps -inf, against which no difference has a meaning.
    const float maximum = block.maxima[vector] == -INFINITY ? 0.0f : block.maxima[vector];
    __m512 weights[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        weights[j] = exp2_of(_mm512_sub_ps(scores[j], _mm512_set1_ps(maximum)));
        __m512 factors = weights[j];
        if (block.scales != nullptr) {  // zero, whatever the scale is, where nothing is seen
            factors = _mm512_maskz_mul_ps(seen[j], factors, _mm512_loadu_ps(block.scales->values + j * kLanes));
        }
        if (shape.dtype == HB_BFLOAT16) factors = _mm512_castsi512_ps(round_to_bfloat(factors));
        if (block.scales == nullptr) weights[j] = factors;
        if (ArePairs) {
            const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(factors), 16);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j * kLanes / 2), _mm512_cvtepi32_epi16(high));
        } else {
            _mm512_storeu_ps(row + j * kLanes, factors);
        }
    }
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(weights[0], weights[1]), _mm512_add_ps(weights[2], weights[3]));
    float* const sums = block.sums + vector * kLanes;
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum));
}

}  // namespace

}  // namespace hb::attention

#endif
