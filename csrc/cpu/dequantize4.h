// 4-bit codes -> values of any dtype: what dequantize4.cpp and its AVX-512 variant share.
#pragma once

#include <stdint.h>

#include "halfbyte.h"

namespace hb {

// Writes blocks from `begin` on, at most to `end`, and returns the first that it leaves: one that is short or whose
// absmax is not finite, and every block on a CPU without AVX-512.
int64_t dequantize_blocks_avx512(const hb_dequantize4_args& args, int64_t begin, int64_t end);

}  // namespace hb
