// Ranking normalised values among a format's thresholds with AVX-512, sixteen at once, by lookups.
//
// Values are cut into buckets of 1/14, so wide that none holds two thresholds. Adding 1.5 * 2^23 to fourteen times a
// value leaves the bucket's number in the low bits of the sum, where a permutation looks for its index (below zero it
// counts back from the table's end). The bucket gives the rank below it and its threshold; one comparison with the
// value itself gives the rank. For values in [-1, 1] or a rounding beyond; NaN gets any rank.
#pragma once

#include "level.h"
#include "ranks4.h"

#ifdef HB_X86

#include <immintrin.h>

namespace hb {

constexpr float kBucketsPerUnit = 14.0f;
constexpr float kBucketMagic = 0x1.8p23f;

struct BucketTable {
    alignas(64) float threshold[32];  // beyond every value where the bucket holds none
    alignas(64) int32_t rank[32];     // the number of thresholds below the bucket
    bool is_valid;
};

template <typename Ranks>
constexpr BucketTable make_buckets() {
    constexpr double kMargin = 1e-3;  // a bucket's number may be rounded either way near its edges
    BucketTable table{};
    table.is_valid = true;
    for (int bucket = -16; bucket < 16; ++bucket) {
        const double start = (bucket - 0.5) / static_cast<double>(kBucketsPerUnit);
        const double end = (bucket + 0.5) / static_cast<double>(kBucketsPerUnit);
        const int at = bucket & 31;
        int inside = 0;
        table.threshold[at] = 2.0f;
        for (int t = 0; t < Ranks::kThresholds; ++t) {
            const double threshold = static_cast<double>(Ranks::threshold(t));
            if (threshold <= start) ++table.rank[at];
            if (threshold > start && threshold < end) {
                table.threshold[at] = static_cast<float>(threshold);
                ++inside;
            }
            const double from_start = threshold - start, from_end = threshold - end;
            if (from_start * from_start < kMargin * kMargin || from_end * from_end < kMargin * kMargin) {
                table.is_valid = false;
            }
        }
        if (inside > 1) table.is_valid = false;
    }
    return table;
}

template <typename Ranks>
struct Buckets {
    static constexpr BucketTable kTable = make_buckets<Ranks>();
    static_assert(kTable.is_valid, "two thresholds share a bucket, or one lies on its edge");
    __m512 low_thresholds, high_thresholds;
    __m512i low_ranks, high_ranks;

    HB_AVX512 Buckets() {
        low_thresholds = _mm512_load_ps(kTable.threshold);
        high_thresholds = _mm512_load_ps(kTable.threshold + 16);
        low_ranks = _mm512_load_si512(kTable.rank);
        high_ranks = _mm512_load_si512(kTable.rank + 16);
    }

    // `ranked` are values, or magnitudes for a format with a sign bit; those need half the table.
    HB_AVX512 __m512i operator()(__m512 ranked) const {
        // However the caller rounds: the bucket's number is a sum rounded to the nearest.
        const __m512 sum = _mm512_fmadd_round_ps(ranked, _mm512_set1_ps(kBucketsPerUnit), _mm512_set1_ps(kBucketMagic),
                                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i bucket = _mm512_castps_si512(sum);
        const __m512 threshold = Ranks::kHasSignBit ? _mm512_permutexvar_ps(bucket, low_thresholds)
                                                    : _mm512_permutex2var_ps(low_thresholds, bucket, high_thresholds);
        const __m512i below = Ranks::kHasSignBit ? _mm512_permutexvar_epi32(bucket, low_ranks)
                                                 : _mm512_permutex2var_epi32(low_ranks, bucket, high_ranks);
        const __mmask16 exceeds = _mm512_cmp_ps_mask(ranked, threshold, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(below, exceeds, below, _mm512_set1_epi32(1));
    }
};

// The float32 that stands for each rank.
template <typename Ranks>
HB_AVX512 inline __m512 values_by_rank() {
    alignas(64) float values[16] = {};
    for (int rank = 0; rank <= Ranks::kThresholds; ++rank) values[rank] = Ranks::value(rank);
    return _mm512_load_ps(values);
}

}  // namespace hb

#endif
