// Decoded weights against bfloat16 activations on AMX tiles; AVX-512 decodes.
#include "avx512_bf16.h"
#include "tiled_kernel.h"

namespace hb {

namespace {

template <typename Vectors>
struct Amx : Vectors {
    using Tiles = AmxTiles;
    template <int Sums, int Weights, int X>
    static HB_INLINE void dot() {
        Tiles::dot_bfloat16<Sums, Weights, X>();
    }
    static HB_INLINE void transpose16(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
        transpose_units(from, from_stride, to, to_stride);
    }
    static HB_INLINE void round_panel(const float* from, uint16_t* to) {
        static_assert(kPanelRows == 32, "a line of bfloat16");
        const __m256i first = bfloats_of_floats(_mm512_load_ps(from)),
                      second = bfloats_of_floats(_mm512_load_ps(from + 16));
        _mm512_storeu_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
};

}  // namespace

const TiledVariants kTiledAmx = {tiled_kernels<Amx<Avx512Bf16>>(), tiled_kernels<Amx<Avx512Bf16Int8>>()};

}  // namespace hb
