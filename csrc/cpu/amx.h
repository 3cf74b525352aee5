// Whether this process may use AMX tiles, and whether they give right products.
#pragma once

#include <stdint.h>

#include "tile_product.h"

namespace hb {

// Asks the processor, the system (which then saves tiles for every thread of this process, until it ends) and, on this
// thread and on a second one, a trial. Any doubt is a no; nothing that might not be permitted is executed.
bool try_amx();

namespace {

// Both products of whole tiles, of integers so small that every order of adding them up gives the same.
template <typename Tiles>
bool tiles_multiply() {
    constexpr int kPairs = 16, kFours = 16, kSize = 16;
    struct Operands {
        uint16_t weights[kSize][kPairs][2], x[kPairs][kSize][2];
        int8_t weights8[kSize][kFours][4], x8[kFours][kSize][4];
        float sums[kSize][kSize];
        int32_t sums8[kSize][kSize];
    };
    alignas(64) Operands o;
    const auto bfloat = [](int value) {
        const float exact = static_cast<float>(value);
        uint32_t bits;
        memcpy(&bits, &exact, sizeof bits);
        return static_cast<uint16_t>(bits >> 16);
    };
    const auto weight = [](int n, int k) { return (n * 5 + k * 3) % 23 - 11; };
    const auto value = [](int m, int k) { return (m * 7 + k * 2) % 19 - 9; };
    for (int i = 0; i < kSize; ++i) {
        for (int k = 0; k < 2 * kPairs; ++k) {
            o.weights[i][k / 2][k % 2] = bfloat(weight(i, k));
            o.x[k / 2][i][k % 2] = bfloat(value(i, k));
        }
        for (int k = 0; k < 4 * kFours; ++k) {
            o.weights8[i][k / 4][k % 4] = static_cast<int8_t>(weight(i, k));
            o.x8[k / 4][i][k % 4] = static_cast<int8_t>(value(i, k));
        }
    }
    {
        const TileScope<Tiles> scope(kSize);
        Tiles::template zero<0>();
        Tiles::template zero<3>();
        Tiles::template load<4>(o.weights, kTileRowBytes);
        Tiles::template load<6>(o.x, kTileRowBytes);
        Tiles::template load<5>(o.weights8, kTileRowBytes);
        Tiles::template load<7>(o.x8, kTileRowBytes);
        Tiles::template dot_bfloat16<0, 4, 6>();
        Tiles::template dot_int8<3, 5, 7>();
        Tiles::template store<0>(o.sums, kTileRowBytes);
        Tiles::template store<3>(o.sums8, kTileRowBytes);
    }
    bool is_right = true;
    for (int n = 0; n < kSize; ++n) {
        for (int m = 0; m < kSize; ++m) {
            int sum = 0, sum8 = 0;
            for (int k = 0; k < 2 * kPairs; ++k) sum += weight(n, k) * value(m, k);
            for (int k = 0; k < 4 * kFours; ++k) sum8 += weight(n, k) * value(m, k);
            is_right = is_right && o.sums[n][m] == static_cast<float>(sum) && o.sums8[n][m] == sum8;
        }
    }
    return is_right;
}

}  // namespace

}  // namespace hb
