// Decoded weights for AVX2: eight lanes of float32. A table of sixteen is two registers of eight; bit 3 of a code
// chooses between what the two hold at its lower three bits.
#include <immintrin.h>

#include "decoded_kernel.h"
#include "formats.h"

namespace hb {

namespace {

struct Avx2 {
    using Value = float;
    using Vector = __m256;
    using Sum = __m256;
    struct Table {
        __m256 lower, upper;
    };
    static constexpr bool kIsInt8 = false;
    static constexpr bool kScalesSums = false;
    static constexpr int64_t kGroup = 16;
    static constexpr int kRows = 2;
    static constexpr int kRowsByFour = 2;
    static constexpr int kFewRows = 2;
    static constexpr int kRowsWithoutTile = 2;

    static HB_INLINE float value(float x) { return x; }
    static HB_INLINE Vector zero() { return _mm256_setzero_ps(); }
    static HB_INLINE Vector load(const float* values) { return _mm256_loadu_ps(values); }
    static HB_INLINE void store(float* to, Vector values) { _mm256_storeu_ps(to, values); }
    static HB_INLINE Vector dot(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }

    static HB_INLINE Table table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
    static HB_INLINE Table scaled(const Table& base, float absmax) {
        const __m256 factor = _mm256_set1_ps(absmax);
        return {_mm256_mul_ps(base.lower, factor), _mm256_mul_ps(base.upper, factor)};
    }
    static HB_INLINE Vector look_up(const Table& table, __m256i codes) {
        const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lower, codes),
                                _mm256_permutevar8x32_ps(table.upper, codes), is_upper);
    }
    static HB_INLINE void decode(const uint8_t* bytes, const Table& table, Vector& high, Vector& low) {
        const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
        high = look_up(table, _mm256_srli_epi32(pairs, 4));
        low = look_up(table, pairs);
    }
    // Four sums of eight lanes -> four numbers: neighbours, then pairs, then the two halves.
    static HB_INLINE void add_lanes(const Vector* sums, float* out) {
        const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    }
};

// An int8 code is a value; its vectors keep the natural order.
struct Avx2Int8 : Avx2 {
    static constexpr bool kIsInt8 = true;
    static HB_INLINE Vector widen(const uint8_t* bytes) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
    }
    static HB_INLINE void decode(const uint8_t* bytes, const Table&, Vector& first, Vector& second) {
        first = widen(bytes);
        second = widen(bytes + 8);
    }
};

}  // namespace

const DecodedVariants kDecodedAvx2 = {decoded_kernels<Avx2>(), decoded_kernels<Avx2Int8>()};

}  // namespace hb
