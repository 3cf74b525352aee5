// What the AVX-512 variants read and write: sixteen values of any dtype as float32, largest magnitudes, stores that go
// around the cache. Conversions equal floats.h bit for bit, but for the payloads of NaNs.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>

#include "floats.h"

#define HB_AVX512BW __attribute__((target("avx512f,avx512bw")))

namespace hb {

// The first `lanes` of sixteen, all of them if it is more.
HB_INLINE __mmask16 lanes_mask(int64_t lanes) {
    return static_cast<__mmask16>(lanes >= 16 ? 0xffff : (1 << lanes) - 1);
}

// 16 rows of 16 lanes -> 16 columns.
HB_AVX512 HB_INLINE void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    // quads[4 * i + j] holds, in its 128-bit part k, column 4 * k + j of rows 4 * i .. 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// Each dtype of values: sixteen of them as float32, and 32 as two vectors that hold the first and the second half of
// them or, where `kAlternates`, those with even and with odd index.
struct Float32Values {
    using Element = float;
    static constexpr bool kAlternates = false;
    static constexpr int kPerVector = 16;
    HB_AVX512BW static __m512 load16(const float* values) { return _mm512_loadu_ps(values); }
    HB_AVX512BW static void load32(const float* values, __m512* first, __m512* second) {
        *first = load16(values), *second = load16(values + 16);
    }
    // The bits of magnitudes, compared as integers.
    HB_AVX512BW static __m512i magnitudes(const float* values) {
        return _mm512_and_si512(_mm512_loadu_si512(values), _mm512_set1_epi32(0x7fffffff));
    }
    HB_AVX512BW static __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
    HB_AVX512BW static float largest(__m512i bits) {
        return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(bits)));
    }
};

// The largest of 32 unsigned 16-bit numbers.
HB_AVX512BW inline uint16_t largest_of_words(__m512i words) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i inverted = _mm_xor_si128(quarter, _mm_set1_epi16(-1));  // there is a search for the smallest only
    return static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(inverted), 0));
}

struct Words {
    using Element = uint16_t;
    static constexpr int kPerVector = 32;
    HB_AVX512BW static __m512i magnitudes(const uint16_t* values) {
        return _mm512_and_si512(_mm512_loadu_si512(values), _mm512_set1_epi16(0x7fff));
    }
    HB_AVX512BW static __m512i larger(__m512i a, __m512i b) { return _mm512_max_epu16(a, b); }
};

struct Float16Values : Words {
    static constexpr bool kAlternates = false;
    HB_AVX512BW static __m512 load16(const uint16_t* values) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    }
    HB_AVX512BW static void load32(const uint16_t* values, __m512* first, __m512* second) {
        *first = load16(values), *second = load16(values + 16);
    }
    HB_AVX512BW static float largest(__m512i bits) { return from_half(largest_of_words(bits)); }
};

struct Bfloat16Values : Words {
    static constexpr bool kAlternates = true;
    HB_AVX512BW static __m512 load16(const uint16_t* values) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    HB_AVX512BW static void load32(const uint16_t* values, __m512* first, __m512* second) {
        const __m512i words = _mm512_loadu_si512(values);
        *first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        *second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    HB_AVX512BW static float largest(__m512i bits) { return from_bfloat(largest_of_words(bits)); }
};

// Of `count` values, a multiple of 32. Infinities and NaNs are the largest, as in floats.h.
template <typename Values>
HB_AVX512BW float largest_magnitude_avx512(const typename Values::Element* values, int64_t count) {
    __m512i largest = Values::magnitudes(values);
    for (int64_t i = Values::kPerVector; i < count; i += Values::kPerVector) {
        largest = Values::larger(largest, Values::magnitudes(values + i));
    }
    return Values::largest(largest);
}

// float32 rounded to bfloat16, in the upper half of each lane. No NaNs.
HB_AVX512BW HB_INLINE __m512i rounded_to_bfloat(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// The upper halves of sixteen lanes.
HB_AVX512BW HB_INLINE __m256i upper_halves(__m512i lanes) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(lanes, 16));
}

template <bool Streams>
HB_AVX512BW void store64(void* out, __m512i bytes) {
    if (Streams) {
        _mm512_stream_si512(static_cast<__m512i*>(out), bytes);
    } else {
        _mm512_storeu_si512(out, bytes);
    }
}

}  // namespace hb

#endif
