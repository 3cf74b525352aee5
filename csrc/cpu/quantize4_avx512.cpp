// Values -> 4-bit codes with AVX-512: ranks by lookups (buckets4.h), sixteen values at once, without a buffer between.
//
// For whole blocks with an ordinary scale; quantize4.cpp does the others, and all of them where there is no AVX-512.
#include "level.h"
#include "quantize4.h"

#ifdef HB_X86

#include <immintrin.h>

#include "buckets4.h"
#include "floats.h"
#include "halfbyte.h"
#include "vectors_avx512.h"

namespace hb {

namespace {

// Codes of sixteen values times a reciprocal. Divided by their largest magnitude they are within the table; by another
// scale they may lie beyond it, and a NaN, which gets rank 0, may be among them.
template <typename Ranks, bool IsWithinTable>
struct CodesOf16 {
    Buckets<Ranks> buckets;
    __m512i code_of_rank;

    HB_AVX512BW CodesOf16() {
        alignas(64) int32_t codes[16] = {};
        for (int rank = 0; rank <= Ranks::kThresholds; ++rank) codes[rank] = Ranks::code(rank);
        code_of_rank = _mm512_load_si512(codes);
    }

    HB_AVX512BW __m512i operator()(__m512 values, __m512 reciprocal) const {
        const __m512 normalised = _mm512_mul_ps(values, reciprocal);
        __m512 ranked = Ranks::kHasSignBit ? _mm512_abs_ps(normalised) : normalised;
        if (!IsWithinTable) {
            // The second operand is what a comparison with NaN gives.
            const __m512 lowest = _mm512_set1_ps(Ranks::kHasSignBit ? 0.0f : -1.0f);
            ranked = _mm512_min_ps(_mm512_max_ps(ranked, lowest), _mm512_set1_ps(1.0f));
        }
        const __m512i rank = buckets(ranked);
        if (!Ranks::kHasSignBit) return rank;  // such a format's codes are the ranks
        const __m512i code = _mm512_permutexvar_epi32(rank, code_of_rank);
        const __mmask16 negative = _mm512_cmp_ps_mask(normalised, _mm512_setzero_ps(), _CMP_LT_OQ);
        return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
    }
};

// Twice sixteen codes, as load32 gave the values -> sixteen bytes, the first of two codes in the high nibble.
template <bool Alternates>
HB_AVX512BW void store_codes(__m512i first, __m512i second, uint8_t* packed) {
    if (Alternates) {
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(first, 4), second);
        return _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(pairs));
    }
    // Packing goes by lanes of 128 bits, four values from either: pairs 0 1 of the first, 0 1 of the second, 2 3 ...
    const __m512i words = _mm512_packus_epi32(first, second);
    const __m512i pairs = _mm512_madd_epi16(words, _mm512_set1_epi32(1 << 16 | 16));
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(pairs), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), bytes);
}

template <typename Ranks, typename Values, bool HasScales>
HB_AVX512BW int64_t encode(const Blocks4& b, int64_t begin, int64_t end, const float* scales, float* absmax) {
    const CodesOf16<Ranks, !HasScales> codes_of;
    const typename Values::Element* const x = static_cast<const typename Values::Element*>(b.x);
    const int64_t whole = b.n / b.blocksize;
    int64_t block = begin;
    for (; block < end && block < whole; ++block) {
        const typename Values::Element* const values = x + block * b.blocksize;
        const float scale = HasScales ? scales[block] : largest_magnitude_avx512<Values>(values, b.blocksize);
        const uint32_t magnitude = bits_of(scale) & 0x7fffffffu;
        if (magnitude < bits_of(kSmallestDivisor) || magnitude >= 0x7f800000u) return block;
        const __m512 reciprocal = _mm512_set1_ps(1.0f / scale);
        uint8_t* const packed = b.packed + block * b.blocksize / 2;
        for (int64_t i = 0; i < b.blocksize; i += 32) {
            __m512 first, second;
            Values::load32(values + i, &first, &second);
            store_codes<Values::kAlternates>(codes_of(first, reciprocal), codes_of(second, reciprocal), packed + i / 2);
        }
        if (!HasScales) absmax[block] = scale;
    }
    return block;
}

template <typename Ranks, typename Values>
int64_t encode(const Blocks4& b, int64_t begin, int64_t end, const float* scales, float* absmax) {
    return scales != nullptr ? encode<Ranks, Values, true>(b, begin, end, scales, absmax)
                             : encode<Ranks, Values, false>(b, begin, end, scales, absmax);
}

template <typename Values>
int64_t encode(const Blocks4& b, int64_t begin, int64_t end, const float* scales, float* absmax) {
    return b.format == HB_NF4 ? encode<Nf4Ranks, Values>(b, begin, end, scales, absmax)
                              : encode<Fp4Ranks, Values>(b, begin, end, scales, absmax);
}

}  // namespace

int64_t encode_blocks_avx512(const Blocks4& b, int64_t begin, int64_t end, const float* scales, float* absmax) {
    if (!has_avx512()) return begin;
    if (b.x_dtype == HB_FLOAT32) return encode<Float32Values>(b, begin, end, scales, absmax);
    if (b.x_dtype == HB_FLOAT16) return encode<Float16Values>(b, begin, end, scales, absmax);
    return encode<Bfloat16Values>(b, begin, end, scales, absmax);
}

}  // namespace hb

#else

namespace hb {

int64_t encode_blocks_avx512(const Blocks4&, int64_t begin, int64_t, const float*, float*) {
    return begin;
}

}  // namespace hb

#endif
