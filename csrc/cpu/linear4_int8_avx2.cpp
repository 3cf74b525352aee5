// What AVX2 does of the 4-bit matmul with int8 activations: codes looked up 32 at a time, and whole groups of 64
// products. linear4_int8_plain.cpp does the rest, and says what is computed.
//
// The instruction that multiplies bytes takes unsigned by signed ones and adds two products in 16 bits: magnitudes of
// the weight's codes by codes of x with their signs turned, at most 2 * 127 * 127, which fits.
#include <immintrin.h>

#include "clones.h"
#include "linear4_int8.h"

namespace hb {

namespace {

constexpr int64_t kHalfGroup = 32;

// Sums of eight neighbouring products each of a group.
HB_INLINE __m256i products(const int8_t* codes, const __m256i* weights, const __m256i* magnitudes) {
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < 2; ++i) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kHalfGroup));
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes[i], _mm256_sign_epi8(x, weights[i]));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sums;
}

HB_INLINE __m128i add_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

}  // namespace

int64_t decode_codes_avx2(const uint8_t* packed, int64_t format, int64_t count, int8_t* out) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(int8_table(format).at));
    const __m128i nibble = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
        const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
        const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(bytes, nibble));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi8(high, low));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16), _mm_unpackhi_epi8(high, low));
    }
    return i;
}

void add_group_avx2(const Int8Job& job, const int8_t* weights, int64_t k, float absmax, float* totals) {
    __m256i w[2], magnitudes[2];
    for (int i = 0; i < 2; ++i) {
        w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k + i * kHalfGroup));
        magnitudes[i] = _mm256_abs_epi8(w[i]);
    }
    const int8_t* codes = job.codes + k;
    const float* scales = job.scales + k / kGroupValues;
    int64_t row = 0;
    for (; row + 4 <= job.rows; row += 4, codes += 4 * job.stride, scales += 4 * job.groups) {
        const __m128i sums =
            add_lanes(products(codes, w, magnitudes), products(codes + job.stride, w, magnitudes),
                      products(codes + 2 * job.stride, w, magnitudes), products(codes + 3 * job.stride, w, magnitudes));
        const __m128 own = _mm_setr_ps(scales[0], scales[job.groups], scales[2 * job.groups], scales[3 * job.groups]);
        const __m128 terms = _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_mul_ps(_mm_set1_ps(absmax), own));
        _mm_storeu_ps(totals + row, _mm_add_ps(_mm_loadu_ps(totals + row), terms));
    }
    for (; row < job.rows; ++row, codes += job.stride, scales += job.groups) {
        const __m256i sums = products(codes, w, magnitudes);
        const float factor = absmax * *scales;
        totals[row] += static_cast<float>(_mm_cvtsi128_si32(add_lanes(sums, sums, sums, sums))) * factor;
    }
}

}  // namespace hb
