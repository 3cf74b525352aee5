// Double-quantized block maxima -> float32 for AVX-512 with VBMI: 64 codes at a time. The map's entries are kept as
// four planes of bytes, so that a plane of 64 results is two lookups of 128 bytes and a choice between them by the
// code's highest bit; unpacking puts the four bytes of each entry together.
#include <immintrin.h>

#include "absmax.h"
#include "clones.h"
#include "formats.h"

namespace hb {

namespace {

constexpr int kPlanes = 4;  // bytes of a float32

struct BytePlanes {
    alignas(64) uint8_t at[kPlanes][256];
};

constexpr BytePlanes make_planes() {
    BytePlanes planes{};
    for (int code = 0; code < 256; ++code) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, kDynamicValues.at[code]);
        for (int plane = 0; plane < kPlanes; ++plane)
            planes.at[plane][code] = static_cast<uint8_t>(bits >> (8 * plane));
    }
    return planes;
}

constexpr BytePlanes kBytes = make_planes();

HB_INLINE __m512i looked_up(const uint8_t* plane, __m512i codes, __mmask64 is_upper) {
    const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(plane), codes, _mm512_load_si512(plane + 64));
    const __m512i upper =
        _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), codes, _mm512_load_si512(plane + 192));
    return _mm512_mask_blend_epi8(is_upper, lower, upper);
}

}  // namespace

void decode_absmax_vbmi(const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out) {
    // Unpacking works inside quarters: with the codes' 4 x 4 groups of four transposed, its results are in order.
    const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t first = 0; first < count; first += 64) {
        const int64_t left = count - first;
        const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        const __m512i some = _mm512_permutexvar_epi32(transposed, _mm512_maskz_loadu_epi8(there, codes + first));
        const __mmask64 is_upper = _mm512_movepi8_mask(some);
        __m512i bytes[kPlanes];
        for (int i = 0; i < kPlanes; ++i) bytes[i] = looked_up(kBytes.at[i], some, is_upper);
        const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
        const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
        const __m512i entries[4] = {_mm512_unpacklo_epi16(low[0], high[0]), _mm512_unpackhi_epi16(low[0], high[0]),
                                    _mm512_unpacklo_epi16(low[1], high[1]), _mm512_unpackhi_epi16(low[1], high[1])};
        for (int i = 0; i < 4; ++i) {
            const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(entries[i]), _mm512_set1_ps(nested_absmax));
            _mm512_mask_storeu_ps(out + first + 16 * i, static_cast<__mmask16>(there >> (16 * i)),
                                  _mm512_add_ps(scaled, _mm512_set1_ps(offset)));
        }
    }
}

}  // namespace hb
