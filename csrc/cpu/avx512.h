// What the AVX-512 variants of several operators share. Included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

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
        const __mmask16 there = lanes_mask(count - i);
        const __m512 magnitude = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, values + i));
        found |= uint64_t{_mm512_mask_cmp_ps_mask(there, magnitude, least, _CMP_GE_OQ)} << i;
    }
    return found;
}

// Sixteen rows of sixteen 32-bit units, rows become columns; strides are in bytes.
HB_INLINE void transpose_units(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_stride);
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, rows[i]);
}

// `bytes` bytes of codes of sixteen rows, at most kTransposedBytes -> units[unit][row], a unit being four bytes. Of
// `rows` rows the last one stands in for those that are not there.
constexpr int64_t kTransposedBytes = 64;
HB_INLINE void transpose_codes(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t bytes, char* units) {
    if (rows == 16 && bytes == kTransposedBytes) {
        transpose_units(reinterpret_cast<const char*>(codes), row_bytes, units, kTransposedBytes);
        return;
    }
    alignas(64) char some[16 * kTransposedBytes] = {};
    for (int64_t i = 0; i < 16; ++i) {
        memcpy(some + i * kTransposedBytes, codes + (i < rows ? i : rows - 1) * row_bytes, static_cast<size_t>(bytes));
    }
    transpose_units(some, kTransposedBytes, units, kTransposedBytes);
}

// absmax [rows, blocks] -> turned[block * Columns + column]; columns beyond the rows are the last row once more.
template <int64_t Columns>
void turn_absmax(const float* absmax, int64_t rows, int64_t blocks, float* turned) {
    for (int64_t first = 0; first < Columns; first += 16) {
        for (int64_t block = 0; block < blocks; block += 16) {
            const int64_t some = blocks - block < 16 ? blocks - block : 16;
            __m512i values[16];
            for (int64_t i = 0; i < 16; ++i) {
                const int64_t row = first + i < rows ? first + i : rows - 1;
                values[i] = _mm512_maskz_loadu_epi32(lanes_mask(some), absmax + row * blocks + block);
            }
            transpose(values);
            for (int64_t b = 0; b < some; ++b) _mm512_storeu_si512(turned + (block + b) * Columns + first, values[b]);
        }
    }
}

}  // namespace

}  // namespace hb
