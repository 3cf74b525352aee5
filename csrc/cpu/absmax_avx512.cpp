// Double-quantized block maxima -> float32 for AVX-512: the map of 256 values in sixteen registers, looked up two at a
// time by a code's lower five bits; its upper three choose among the eight that are found.
#include <immintrin.h>

#include "absmax.h"
#include "formats.h"
#include "vectors_avx512.h"

namespace hb {

void decode_absmax_avx512(const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out) {
    __m512 map[16];
    for (int i = 0; i < 16; ++i) map[i] = _mm512_loadu_ps(kDynamicValues.at + 16 * i);
    for (int64_t first = 0; first < count; first += 16) {
        const __mmask16 there = lanes_mask(count - first);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, codes + first));
        __m512 found[8];
        for (int i = 0; i < 8; ++i) found[i] = _mm512_permutex2var_ps(map[2 * i], code, map[2 * i + 1]);
        for (int half = 4, bit = 32; half > 0; half /= 2, bit *= 2) {
            const __mmask16 is_upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
            for (int i = 0; i < half; ++i) found[i] = _mm512_mask_blend_ps(is_upper, found[2 * i], found[2 * i + 1]);
        }
        const __m512 scaled = _mm512_mul_ps(found[0], _mm512_set1_ps(nested_absmax));
        _mm512_mask_storeu_ps(out + first, there, _mm512_add_ps(scaled, _mm512_set1_ps(offset)));
    }
}

}  // namespace hb
