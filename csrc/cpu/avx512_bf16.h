// The vectors of decoded weights for AVX-512 with BF16, which the levels above also decode with: 32 weights a lookup,
// 32 products an instruction. Included only by files compiled for that.
//
// The table, scaled by absmax and rounded to bfloat16, holds its sixteen entries twice: the lookup of 16-bit lanes
// heeds five bits of each byte, and the fifth belongs to the other code. Sums are float32; the products' instruction
// takes subnormal values as zeros.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "avx512.h"
#include "clones.h"
#include "floats.h"

namespace hb {

namespace {

struct Avx512Bf16 {
    using Value = uint16_t;
    using Vector = __m512i;
    using Sum = __m512;
    using Table = __m512;  // float32 as made by table(), bfloat16 twice as made by scaled()
    static constexpr bool kIsInt8 = false;
    static constexpr bool kScalesSums = true;
    static constexpr int64_t kGroup = 64;
    static constexpr int kRows = 6;
    static constexpr int kRowsByFour = 4;
    static constexpr int kFewRows = 8;
    static constexpr int kRowsWithoutTile = 16;

    static HB_INLINE uint16_t value(float x) { return to_bfloat(x); }
    static HB_INLINE Sum zero() { return _mm512_setzero_ps(); }
    static HB_INLINE Vector load(const uint16_t* values) { return _mm512_loadu_si512(values); }
    static HB_INLINE void store(uint16_t* to, Vector values) { _mm512_storeu_si512(to, values); }
    static HB_INLINE Sum dot(Sum sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static HB_INLINE Sum add_scaled(Sum sum, Sum block, float scale) {
        return _mm512_fmadd_ps(block, _mm512_set1_ps(scale), sum);
    }
    static HB_INLINE Table table(const float* values) { return _mm512_loadu_ps(values); }
    static HB_INLINE Table scaled(Table base, float absmax) {
        const __m256bh once = _mm512_cvtneps_pbh(_mm512_mul_ps(base, _mm512_set1_ps(absmax)));
        return _mm512_castsi512_ps(_mm512_broadcast_i64x4((__m256i)once));
    }
    static HB_INLINE void decode(const uint8_t* bytes, Table table, Vector& high, Vector& low) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        high = _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), _mm512_castps_si512(table));
        low = _mm512_permutexvar_epi16(pairs, _mm512_castps_si512(table));
    }
    static HB_INLINE void add_lanes(const Sum* sums, float* out) { add_lanes_of_four(sums, out); }
};

// An int8 code is a value, exact in bfloat16; its vectors keep the natural order.
struct Avx512Bf16Int8 : Avx512Bf16 {
    static constexpr bool kIsInt8 = true;
    static constexpr bool kScalesSums = false;
    static HB_INLINE void decode(const uint8_t* bytes, Table, Vector& first, Vector& second) {
        first = (__m512i)_mm512_cvtne2ps_pbh(floats_of_int8(bytes + 16), floats_of_int8(bytes));
        second = (__m512i)_mm512_cvtne2ps_pbh(floats_of_int8(bytes + 48), floats_of_int8(bytes + 32));
    }
};

}  // namespace

}  // namespace hb
