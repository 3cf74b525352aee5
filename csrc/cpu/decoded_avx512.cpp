// Decoded weights for AVX-512: sixteen lanes of float32, and the whole table in one register. Sixteen bytes, widened
// to 32-bit lanes, are looked up as they are for their low codes (the lookup heeds four bits) and shifted for their
// high.
#include "avx512.h"
#include "decoded_kernel.h"
#include "formats.h"

namespace hb {

namespace {

struct Avx512 {
    using Value = float;
    using Vector = __m512;
    using Sum = __m512;
    using Table = __m512;
    static constexpr bool kIsInt8 = false;
    static constexpr bool kScalesSums = false;
    static constexpr int64_t kGroup = 32;
    static constexpr int kRows = 6;
    static constexpr int kRowsByFour = 6;
    static constexpr int kFewRows = 6;
    static constexpr int kRowsWithoutTile = 6;

    static HB_INLINE float value(float x) { return x; }
    static HB_INLINE Vector zero() { return _mm512_setzero_ps(); }
    static HB_INLINE Vector load(const float* values) { return _mm512_loadu_ps(values); }
    static HB_INLINE void store(float* to, Vector values) { _mm512_storeu_ps(to, values); }
    static HB_INLINE Vector dot(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
    static HB_INLINE Table table(const float* values) { return _mm512_loadu_ps(values); }
    static HB_INLINE Table scaled(Table base, float absmax) { return _mm512_mul_ps(base, _mm512_set1_ps(absmax)); }
    static HB_INLINE void decode(const uint8_t* bytes, Table table, Vector& high, Vector& low) {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        high = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
        low = _mm512_permutexvar_ps(pairs, table);
    }
    static HB_INLINE void add_lanes(const Sum* sums, float* out) { add_lanes_of_four(sums, out); }
};

// An int8 code is a value; its vectors keep the natural order.
struct Avx512Int8 : Avx512 {
    static constexpr bool kIsInt8 = true;
    static HB_INLINE void decode(const uint8_t* bytes, Table, Vector& first, Vector& second) {
        first = floats_of_int8(bytes);
        second = floats_of_int8(bytes + 16);
    }
};

}  // namespace

const DecodedVariants kDecodedAvx512 = {decoded_kernels<Avx512>(), decoded_kernels<Avx512Int8>()};

}  // namespace hb
