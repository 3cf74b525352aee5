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
constexpr float kLargestHalf = 65504.0f;

// As float16 would hold them; for values that it can hold.
template <typename Values>
HB_AVX512BW __m512 load_through_half(const typename Values::Element* values) {
    const __m512 loaded = Values::load16(values);
    if (std::is_same<Values, Float16Values>::value) return loaded;
    return _mm512_cvtph_ps(_mm512_cvtps_ph(loaded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <typename Values>
HB_AVX512BW int64_t write_codes(const void* row, int64_t count, float factor, int8_t* codes) {
    const typename Values::Element* const values = static_cast<const typename Values::Element*>(row);
    const __m512 by = _mm512_set1_ps(factor);
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(load_through_half<Values>(values + k), by));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(numbers));
    }
    return k;
}

template <typename Values>
float largest_of_row(const void* row, int64_t count) {
    return largest_magnitude_avx512<Values>(static_cast<const typename Values::Element*>(row), count);
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

int64_t largest_avx512(const void* row, int64_t dtype, int64_t count, float* largest) {
    const int64_t whole = has_avx512() ? count / 32 * 32 : 0;
    if (whole == 0) return 0;
    *largest = dtype == HB_FLOAT32   ? largest_of_row<Float32Values>(row, whole)
               : dtype == HB_FLOAT16 ? largest_of_row<Float16Values>(row, whole)
                                     : largest_of_row<Bfloat16Values>(row, whole);
    return whole;
}

int64_t quantize_avx512(const void* row, int64_t dtype, int64_t count, float absmax, int8_t* codes) {
    // Beyond the largest float16 values stay as they are, and those that are not finite get zeros.
    if (!has_avx512() || !(absmax <= kLargestHalf)) return 0;
    const float factor = int8_factor(absmax);
    if (dtype == HB_FLOAT32) return write_codes<Float32Values>(row, count, factor, codes);
    if (dtype == HB_FLOAT16) return write_codes<Float16Values>(row, count, factor, codes);
    return write_codes<Bfloat16Values>(row, count, factor, codes);
}

int64_t dequantize_avx512(const int8_t* codes, int64_t count, float absmax, void* out, int64_t dtype, bool streams) {
    if (!has_avx512() || (bits_of(absmax) & 0x7fffffffu) >= 0x7f800000u) return 0;
    if (dtype == HB_FLOAT32) return dequantize<ToFloat32>(codes, count, absmax, out, streams);
    if (dtype == HB_FLOAT16) return dequantize<ToFloat16>(codes, count, absmax, out, streams);
    return dequantize<ToBfloat16>(codes, count, absmax, out, streams);
}

}  // namespace hb

#else

namespace hb {

int64_t largest_avx512(const void*, int64_t, int64_t, float*) {
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
