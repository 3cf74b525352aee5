// LLM.int8() for AVX-512 with VNNI: 64 products of an unsigned and a signed byte an instruction, added in fours in 32
// bits without saturation.
#include "avx512.h"
#include "linear8_kernel.h"

namespace hb {

namespace {

struct Avx512Int8 {
    using Codes = __m512i;  // code + 128
    using Weights = __m512i;
    using Sum = __m512i;
    static constexpr int64_t kGroup = 64;
    static constexpr int kRows = 6;
    static constexpr int kOffset = 128;

    static HB_INLINE Codes load_codes(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
    static HB_INLINE Weights load_weights(const int8_t* weights) { return _mm512_loadu_si512(weights); }
    static HB_INLINE Sum dot(Sum sum, Codes codes, Weights weights) { return _mm512_dpbusd_epi32(sum, codes, weights); }
    static HB_INLINE Sum add(Sum sum, Weights weights) {
        return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), weights);
    }
    static HB_INLINE void totals(const Sum* sums, int32_t* out) {
        const __m512i ab =
            _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
        const __m512i cd =
            _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
        const __m512i quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i halves =
            _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
        const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), all);
    }
    static HB_INLINE uint64_t outliers(const float* values, int64_t count, float threshold) {
        return outliers_of_floats(values, count, threshold);
    }
};

}  // namespace

const Kernels8 kLinear8Avx512 = linear8_kernels<Avx512Int8>();

}  // namespace hb
