// Double-quantized block maxima inside one second-level block -> float32, the product and the sum rounded separately.
#pragma once

#include <stdint.h>

namespace hb {

#ifdef __x86_64__
void decode_absmax_avx512(const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out);
void decode_absmax_vbmi(const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out);
#endif

}  // namespace hb
