// Rowwise int8 with AVX-512: the conversions of int8.cpp without buffers between, float16 by the processor's own.
#include "int8.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>

#include <type_traits>

#include "halfbyte.h"
#include "vectors_avx512.h"

namespace hb {

namespace {

constexpr int64_t kLanes = 16;

HB_AVX512BW inline __mmask16 below(__m512 magnitudes, float bound) {
    return _mm512_cmp_ps_mask(magnitudes, _mm512_set1_ps(bound), _CMP_LE_OQ);
}

// As float16 would hold them; what float16 would make infinite, and NaN, stays as it is.
template <typename Values>
HB_AVX512BW __m512 load_through_half(const typename Values::Element* values) {
    const __m512 loaded = Values::load16(values);
    if (std::is_same<Values, Float16Values>::value) return loaded;
    const __m512 half = _mm512_cvtph_ps(_mm512_cvtps_ph(loaded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_mask_mov_ps(loaded, below(_mm512_abs_ps(half), 65504.0f), half);
}

template <typename Values>
HB_AVX512BW float row_absmax(const typename Values::Element* row, int64_t count) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += kLanes) {
        const __m512 magnitudes = _mm512_abs_ps(load_through_half<Values>(row + k));
        largest = _mm512_max_epi32(largest, _mm512_castps_si512(magnitudes));  // NaN and infinity are the largest
    }
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)));
}

template <typename Values>
HB_AVX512BW void write_codes(const typename Values::Element* row, int64_t count, float factor, int8_t* codes) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t k = 0; k < count; k += kLanes) {
        const __m512 scaled = _mm512_mul_ps(load_through_half<Values>(row + k), by);
        const __m512 rounded = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i numbers = _mm512_maskz_cvtps_epi32(below(_mm512_abs_ps(rounded), kInt8Max), rounded);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(numbers));
    }
}

HB_AVX512BW inline __m512 scaled16(const int8_t* codes, __m512 absmax) {
    const __m512i numbers = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_div_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(numbers), absmax), _mm512_set1_ps(kInt8Max));
}

struct ToFloat32 {
    using Element = float;
    static constexpr int64_t kPerStore = 16;
    HB_AVX512BW static __m512i decode(const int8_t* codes, __m512 absmax) {
        return _mm512_castps_si512(scaled16(codes, absmax));
    }
};

struct ToFloat16 {
    using Element = uint16_t;
    static constexpr int64_t kPerStore = 32;
    HB_AVX512BW static __m256i half(const int8_t* codes, __m512 absmax) {
        return _mm512_cvtps_ph(scaled16(codes, absmax), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    HB_AVX512BW static __m512i decode(const int8_t* codes, __m512 absmax) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(half(codes, absmax)), half(codes + kLanes, absmax), 1);
    }
};

struct ToBfloat16 {
    using Element = uint16_t;
    static constexpr int64_t kPerStore = 32;
    HB_AVX512BW static __m256i half(const int8_t* codes, __m512 absmax) {
        return upper_halves(rounded_to_bfloat(scaled16(codes, absmax)));
    }
    HB_AVX512BW static __m512i decode(const int8_t* codes, __m512 absmax) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(half(codes, absmax)), half(codes + kLanes, absmax), 1);
    }
};

template <typename Target>
HB_AVX512BW int64_t dequantize(const int8_t* codes, int64_t count, float absmax, void* out, bool streams) {
    typename Target::Element* const values = static_cast<typename Target::Element*>(out);
    const __m512 scale = _mm512_set1_ps(absmax);
    int64_t k = 0;
    if (streams && reinterpret_cast<uintptr_t>(values) % 64 == 0) {
        for (; k + Target::kPerStore <= count; k += Target::kPerStore) {
            store64<true>(values + k, Target::decode(codes + k, scale));
        }
        _mm_sfence();
    }
    for (; k + Target::kPerStore <= count; k += Target::kPerStore) {
        store64<false>(values + k, Target::decode(codes + k, scale));
    }
    return k;
}

}  // namespace

int64_t absmax_avx512(const void* row, int64_t dtype, int64_t count, float* absmax) {
    const int64_t whole = has_avx512bw() ? count / kLanes * kLanes : 0;
    if (whole == 0) return 0;
    *absmax = dtype == HB_FLOAT32   ? row_absmax<Float32Values>(static_cast<const float*>(row), whole)
              : dtype == HB_FLOAT16 ? row_absmax<Float16Values>(static_cast<const uint16_t*>(row), whole)
                                    : row_absmax<Bfloat16Values>(static_cast<const uint16_t*>(row), whole);
    return whole;
}

int64_t quantize_avx512(const void* row, int64_t dtype, int64_t count, float factor, int8_t* codes) {
    const int64_t whole = has_avx512bw() ? count / kLanes * kLanes : 0;
    if (dtype == HB_FLOAT32) {
        write_codes<Float32Values>(static_cast<const float*>(row), whole, factor, codes);
    } else if (dtype == HB_FLOAT16) {
        write_codes<Float16Values>(static_cast<const uint16_t*>(row), whole, factor, codes);
    } else {
        write_codes<Bfloat16Values>(static_cast<const uint16_t*>(row), whole, factor, codes);
    }
    return whole;
}

int64_t dequantize_avx512(const int8_t* codes, int64_t count, float absmax, void* out, int64_t dtype, bool streams) {
    if (!has_avx512bw() || (bits_of(absmax) & 0x7fffffffu) >= 0x7f800000u) return 0;
    if (dtype == HB_FLOAT32) return dequantize<ToFloat32>(codes, count, absmax, out, streams);
    if (dtype == HB_FLOAT16) return dequantize<ToFloat16>(codes, count, absmax, out, streams);
    return dequantize<ToBfloat16>(codes, count, absmax, out, streams);
}

}  // namespace hb

#else

namespace hb {

int64_t absmax_avx512(const void*, int64_t, int64_t, float*) {
    return 0;
}

int64_t quantize_avx512(const void*, int64_t, int64_t, float, int8_t*) {
    return 0;
}

int64_t dequantize_avx512(const int8_t*, int64_t, float, void*, int64_t, bool) {
    return 0;
}

}  // namespace hb

#endif
