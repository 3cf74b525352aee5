// LLM.int8() on AMX tiles: 16 by 16 sums of 64 products of signed bytes an instruction.
#include "avx512.h"
#include "linear8_tiled.h"

namespace hb {

namespace {

struct AmxInt8 {
    using Tiles = AmxTiles;
    using Sum = int32_t;
    [[maybe_unused]] static constexpr int64_t kGroup = 64;
    static constexpr int kRows = 1;
    static constexpr int kOffset = 0;

    template <int Sums, int Weights, int X>
    static HB_INLINE void dot() {
        Tiles::dot_int8<Sums, Weights, X>();
    }
    static HB_INLINE void transpose16(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
        transpose_units(from, from_stride, to, to_stride);
    }
    static HB_INLINE uint64_t outliers(const float* values, int64_t count, float threshold) {
        return outliers_of_floats(values, count, threshold);
    }
};

}  // namespace

const Kernels8 kLinear8Amx = tiled8_kernels<AmxInt8>();

}  // namespace hb
