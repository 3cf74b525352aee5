// LLM.int8() for AVX2: sixteen codes widened to 16 bits; neighbouring products are added in 32 bits, exactly.
#include <immintrin.h>

#include "linear8_kernel.h"

namespace hb {

namespace {

struct Avx2Int8 {
    using Codes = __m256i;
    using Weights = __m256i;
    using Sum = __m256i;
    static constexpr int64_t kGroup = 16;
    static constexpr int kRows = 2;
    static constexpr int kOffset = 0;

    static HB_INLINE __m256i widen(const void* codes) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(codes)));
    }
    static HB_INLINE Codes load_codes(const uint8_t* codes) { return widen(codes); }
    static HB_INLINE Weights load_weights(const int8_t* weights) { return widen(weights); }
    static HB_INLINE Sum dot(Sum sum, Codes codes, Weights weights) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, weights));
    }
    static HB_INLINE void totals(const Sum* sums, int32_t* out) {
        const __m256i pairs =
            _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
        const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), all);
    }
    static HB_INLINE uint64_t outliers(const float* values, int64_t count, float threshold) {
        return outliers_one_by_one(values, count, threshold);
    }
};

}  // namespace

const Kernels8 kLinear8Avx2 = linear8_kernels<Avx2Int8>();

}  // namespace hb
