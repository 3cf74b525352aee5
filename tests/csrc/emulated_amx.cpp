// The kernels of the level amx, compiled for emulated tiles and vectors in plain C++, so that they run on any machine
// and under sanitizers. Takes the place of cpu/decoded_amx.cpp and cpu/linear8_amx.cpp in the program that it is part
// of; that program always runs at this level, and elsewhere does without AVX-512.
#include <string.h>

#include "cpu/level.h"
#include "cpu/linear8_tiled.h"
#include "cpu/tiled_kernel.h"
#include "emulated_tiles.h"

namespace hb {

namespace {

struct Transposing {
    using Tiles = testing::EmulatedTiles;
    static void transpose16(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
        for (int64_t r = 0; r < kTileRows; ++r) {
            for (int64_t c = 0; c < kTileRows; ++c) {
                memcpy(to + c * to_stride + r * kUnitBytes, from + r * from_stride + c * kUnitBytes, kUnitBytes);
            }
        }
    }
};

struct PlainBf16 : Transposing {
    struct Vector {
        uint16_t at[32];
    };
    struct Table {
        float base[16];
        uint16_t scaled[16];
    };
    static constexpr bool kIsInt8 = false;
    static constexpr int64_t kGroup = 64;

    template <int Sums, int Weights, int X>
    static void dot() {
        Tiles::dot_bfloat16<Sums, Weights, X>();
    }
    static void store(uint16_t* to, const Vector& values) { memcpy(to, values.at, sizeof values.at); }
    static void round_panel(const float* from, uint16_t* to) {
        for (int64_t i = 0; i < kPanelRows; ++i) to[i] = to_bfloat(from[i]);
    }
    static Table table(const float* values) {
        Table made{};
        memcpy(made.base, values, sizeof made.base);
        return made;
    }
    static Table scaled(Table table, float absmax) {
        for (int i = 0; i < 16; ++i) table.scaled[i] = to_bfloat(table.base[i] * absmax);
        return table;
    }
    static void decode(const uint8_t* bytes, const Table& table, Vector& high, Vector& low) {
        for (int i = 0; i < 32; ++i) {
            high.at[i] = table.scaled[bytes[i] >> 4];
            low.at[i] = table.scaled[bytes[i] & 15];
        }
    }
};

struct PlainBf16Int8 : PlainBf16 {
    static constexpr bool kIsInt8 = true;
    static void decode(const uint8_t* bytes, const Table&, Vector& first, Vector& second) {
        for (int i = 0; i < 32; ++i) {
            first.at[i] = to_bfloat(static_cast<float>(static_cast<int8_t>(bytes[i])));
            second.at[i] = to_bfloat(static_cast<float>(static_cast<int8_t>(bytes[i + 32])));
        }
    }
};

struct PlainInt8 : Transposing {
    using Sum = int32_t;
    [[maybe_unused]] static constexpr int64_t kGroup = 64;
    static constexpr int kRows = 1;
    static constexpr int kOffset = 0;

    template <int Sums, int Weights, int X>
    static void dot() {
        Tiles::dot_int8<Sums, Weights, X>();
    }
    static uint64_t outliers(const float* values, int64_t count, float threshold) {
        return outliers_one_by_one(values, count, threshold);
    }
};

}  // namespace

const TiledVariants kTiledAmx = {tiled_kernels<PlainBf16>(), tiled_kernels<PlainBf16Int8>()};
const Kernels8 kLinear8Amx = tiled8_kernels<PlainInt8>();

Level level() {
    return kAmx;
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
    return false;
}

bool has_vbmi() {
    return __builtin_cpu_supports("avx512vbmi");
}

}  // namespace hb

extern "C" const char* hb_level(void) {
    return "amx";
}

extern "C" int64_t hb_levels(const char** names, int64_t room) {
    if (names == nullptr || room < 1) return -1;
    names[0] = hb_level();
    return 1;
}
