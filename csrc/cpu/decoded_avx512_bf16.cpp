// Decoded weights against bfloat16 activations for AVX-512 with BF16.
#include "avx512_bf16.h"
#include "decoded_kernel.h"
#include "formats.h"

namespace hb {

const DecodedVariants kDecodedAvx512Bf16 = {decoded_kernels<Avx512Bf16>(), decoded_kernels<Avx512Bf16Int8>()};

}  // namespace hb
