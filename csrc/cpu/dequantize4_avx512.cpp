// 4-bit codes -> values with AVX-512. The sixteen values that a block's codes can have are made once per block, as the
// output has them; then a permutation looks up a whole vector at once. The roof is memory.
//
// Each byte goes into a lane of its own, the high nibble (the first value) into its lower half and the low nibble into
// its upper one, so that the values come out in order. What else is in a half is above the index bits that a
// permutation reads, but for one bit of the 16-bit ones: their table holds every value twice.
#include "dequantize4.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>

#include "formats.h"
#include "stream.h"
#include "vectors_avx512.h"

namespace hb {

namespace {

// Each has a Table made of a block's sixteen float32 values, and `decode`, which writes 64 bytes of output.
struct ToFloat32 {
    using Element = float;
    static constexpr int kPerStore = 16;
    using Table = __m512i;
    HB_AVX512BW static Table make_table(__m512 values) { return _mm512_castps_si512(values); }
    HB_AVX512BW static __m512i decode(const uint8_t* bytes, Table table) {
        const __m512i lanes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(lanes, 4), _mm512_slli_epi64(lanes, 32));
        return _mm512_permutexvar_epi32(codes, table);
    }
};

struct ToWords {
    using Element = uint16_t;
    static constexpr int kPerStore = 32;
    using Table = __m512i;
    HB_AVX512BW static __m512i decode(const uint8_t* bytes, Table table) {
        const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(lanes, 4), _mm512_slli_epi32(lanes, 16));
        return _mm512_permutexvar_epi16(codes, table);
    }
};

struct ToFloat16 : ToWords {
    HB_AVX512BW static Table make_table(__m512 values) {
        return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

struct ToBfloat16 : ToWords {
    HB_AVX512BW static Table make_table(__m512 values) {
        return _mm512_broadcast_i64x4(upper_halves(rounded_to_bfloat(values)));
    }
};

template <typename Target, bool Streams>
HB_AVX512BW int64_t dequantize(const hb_dequantize4_args& a, int64_t begin, int64_t end) {
    const __m512 format_values = _mm512_loadu_ps(a.format == HB_NF4 ? kNf4Values.at : kFp4Values.at);
    typename Target::Element* const out = static_cast<typename Target::Element*>(a.out);
    const int64_t whole = a.n / a.blocksize;
    int64_t block = begin;
    for (; block < end && block < whole; ++block) {
        const float absmax = a.absmax[block];
        if ((bits_of(absmax) & 0x7fffffffu) >= 0x7f800000u) break;
        const auto table = Target::make_table(_mm512_mul_ps(format_values, _mm512_set1_ps(absmax)));
        const int64_t first = block * a.blocksize;
        for (int64_t i = first; i < first + a.blocksize; i += Target::kPerStore) {
            store64<Streams>(out + i, Target::decode(a.packed + i / 2, table));
        }
    }
    if (Streams) _mm_sfence();
    return block;
}

template <typename Target>
int64_t dequantize(const hb_dequantize4_args& a, int64_t begin, int64_t end) {
    const int64_t bytes = a.n * static_cast<int64_t>(sizeof(typename Target::Element));
    const bool streams = should_stream(bytes) && reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
    return streams ? dequantize<Target, true>(a, begin, end) : dequantize<Target, false>(a, begin, end);
}

}  // namespace

int64_t dequantize_blocks_avx512(const hb_dequantize4_args& args, int64_t begin, int64_t end) {
    if (!has_avx512()) return begin;
    if (args.out_dtype == HB_FLOAT32) return dequantize<ToFloat32>(args, begin, end);
    if (args.out_dtype == HB_FLOAT16) return dequantize<ToFloat16>(args, begin, end);
    return dequantize<ToBfloat16>(args, begin, end);
}

}  // namespace hb

#else

namespace hb {

int64_t dequantize_blocks_avx512(const hb_dequantize4_args&, int64_t begin, int64_t) {
    return begin;
}

}  // namespace hb

#endif
