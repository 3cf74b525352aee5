// What the AVX-512 variants of several operators share. Included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "clones.h"
#include "vectors_avx512.h"

namespace hb {

namespace {

HB_INLINE __m512 floats_of_int8(const uint8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

// Sixteen values rounded as to_bfloat does, which the instruction for it does not: that takes subnormals for zeros.
HB_INLINE __m256i bfloats_of_floats(__m512 values) {
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return upper_halves(_mm512_mask_mov_epi32(rounded_to_bfloat(values), nan, _mm512_set1_epi32(0x7fc00000)));
}

// Four sums of sixteen lanes -> four numbers, in one fixed tree: neighbours, pairs, then the four quarters.
HB_INLINE void add_lanes_of_four(const __m512* sums, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512 quarters =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));  // a b c d, four times
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// Which of up to 64 values reach the threshold, one bit each.
HB_INLINE uint64_t outliers_of_floats(const float* values, int64_t count, float threshold) {
    const __m512 least = _mm512_set1_ps(threshold);
    uint64_t found = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 there = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
        const __m512 magnitude = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, values + i));
        found |= uint64_t{_mm512_mask_cmp_ps_mask(there, magnitude, least, _CMP_GE_OQ)} << i;
    }
    return found;
}

// Sixteen rows of sixteen 32-bit units, rows become columns; strides are in bytes.
HB_INLINE void transpose_units(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
    __m512i rows[16], pairs[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_stride);
    // In each quarter of 128 bits: 2 x 2 units, then 4 x 4; then the quarters change places twice.
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i ab_even = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        const __m512i ab_odd = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        const __m512i cd_even = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        const __m512i cd_odd = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(ab_even, cd_even, 0x88));
        _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd));
        _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd));
    }
}

}  // namespace

}  // namespace hb
