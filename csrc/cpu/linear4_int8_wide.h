// What the AVX-512 files of the 4-bit matmul with int8 activations share: pairs of groups, how codes become bytes, and
// the way for more than a few rows. Included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "clones.h"
#include "linear4_int8.h"

namespace hb {

constexpr int64_t kPairBytes = 64;  // packed bytes of two groups
constexpr int64_t kPairValues = 2 * kGroupValues;
constexpr int64_t kLanes = 16;
constexpr int kWeightOffset = 128;   // that bytes of the weight are looked up with
constexpr int64_t kPanelGroups = 8;  // of 32 weight rows, at most: 16 KB
constexpr int64_t kPanelBytes = kPanelGroups * kGroupValues * kInt8Columns;

// All rows of x against up to kInt8Columns weight rows from row n on -> totals [rows, kInt8Columns]. absmax:
// [blocks][kInt8Columns]; panel: kPanelBytes, 64-byte aligned.
void run_int8_columns(const Int8Job& job, int64_t n, int64_t columns, const float* absmax, uint8_t* panel,
                      float* totals);

namespace {

HB_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

HB_INLINE __m512i unsigned_table(int64_t format) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(int8_table(format).at));
    return _mm512_broadcast_i32x4(_mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(kWeightOffset))));
}

HB_INLINE void decode(__m512i bytes, __m512i table, __m512i& high, __m512i& low) {
    const __m512i nibble = _mm512_set1_epi8(15);
    high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
    low = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble));
}

}  // namespace

}  // namespace hb
