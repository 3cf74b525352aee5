// The search for a block's scale: what search4.cpp and its AVX-512 variant share.
//
// Both hold one factor in each of sixteen lanes and go over the block's values in order, so that sums are added up as
// quant/reference.py says whatever the vectors' width.
#pragma once

#include <stdint.h>

#include "formats.h"

namespace hb {

constexpr int kFactorLanes = kSearchCount;
constexpr int kMostFactors = kSearchFactors.length;
static_assert(kFactorLanes == 16, "what a vector of 512 bits holds");

// Of a block at several factors, by lane: sum(x q) and sum(q q), where q is the table's value nearest to x / factor.
struct Fit {
    alignas(64) float products[kMostFactors];
    alignas(64) float powers[kMostFactors];
};

// How a search does its work: `fit` for `count` factors, a multiple of kFactorLanes; `errors` the squared errors of
// kFactorLanes factors. Values are divided by the block's largest magnitude, and magnitudes for a format with a sign
// bit.
struct SearchSteps {
    void (*fit)(const float* values, int64_t length, const float* reciprocals, int64_t count, Fit* fit);
    void (*errors)(const float* values, int64_t length, const float* factors, const float* reciprocals, float* errors);
};

// The steps for HB_NF4 or HB_FP4 on a CPU with AVX-512; null where it has none or may not use it.
const SearchSteps* search_steps_avx512(int64_t format);

}  // namespace hb
