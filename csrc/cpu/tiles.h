// The tile instructions (AMX) that the kernels are written in: eight registers of up to 16 rows of 64 bytes, and
// products of two of them added to a third.
//
//     sums[m][n] += weights[m][k] * x[k][n]       bfloat16: k runs over pairs of neighbours; int8: over fours
//
// Not here: who may execute them (amx.h). Numbers of tiles are part of an instruction, so they are template arguments.
// They are written as assembly because GCC's intrinsics are macros that take no template argument and, for loads, do
// not say that memory is read: the compiler may then move the stores that fill an operand behind the load.
#pragma once

#include <stdint.h>

#include "clones.h"

namespace hb {

// What LDTILECFG reads.
struct alignas(64) TileConfig {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

namespace {

struct AmxTiles {
    static HB_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
    static HB_INLINE void release() { asm volatile("tilerelease"); }
    template <int Tile>
    static HB_INLINE void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
    }
    // Rows `stride` bytes apart.
    template <int Tile>
    static HB_INLINE void load(const void* rows, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(rows), "r"(stride) : "memory");
    }
    template <int Tile>
    static HB_INLINE void store(void* rows, int64_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(rows), "r"(stride) : "memory");
    }
    template <int Sums, int Weights, int X>
    static HB_INLINE void dot_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Weights), "i"(X));
    }
    // Signed by signed.
    template <int Sums, int Weights, int X>
    static HB_INLINE void dot_int8() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Weights), "i"(X));
    }
};

}  // namespace

}  // namespace hb
