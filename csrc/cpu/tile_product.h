// What the matmuls on tiles share: the product of a panel of weight rows with all of x, and how x is laid out for it.
//
// The weight rows are the left operand, read as they lie, so that decoding and copying need no second order. x is the
// right one: rows are kept together, up to sixteen, in units of four bytes (two bfloat16, four int8), and a product is
// transposed once at the end, where it is small.
//
//     panel [rows, 64 * steps bytes]      x: blocks of [16 * steps units, columns]      sums: [16, columns] a tile
//
// x is cut evenly into blocks of `columns` rows, so that one shape of tiles does for all: one row alone costs no more
// than its own bytes. Two by two tiles of sums stay in registers over a stretch of the panel, 1 KB of a weight row:
// then 32 weight rows, or 32 rows of x, fit into the first cache. Between stretches sums wait in memory as they are,
// so the order in which they are added up depends on nothing but the length of a row.
#pragma once

#include <stdint.h>
#include <string.h>

#include "clones.h"
#include "tile_blocks.h"
#include "tiles.h"

namespace hb {

namespace {

// Tiles are configured where a scope begins, and gone where it ends.
//
//     0 .. 3 sums, [weights][x]      4, 5 weights      6, 7 x
template <typename Tiles>
class TileScope {
  public:
    explicit TileScope(int64_t columns) {
        TileConfig config{};
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            const bool is_weight = tile == 4 || tile == 5;
            config.rows[tile] = kTileRows;
            config.row_bytes[tile] = static_cast<uint16_t>(is_weight ? kTileRowBytes : columns * kUnitBytes);
        }
        Tiles::configure(config);
    }
    ~TileScope() { Tiles::release(); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

// to[c][r] = from[r][c], units of four bytes; strides are in bytes.
template <typename Isa>
HB_INLINE void transpose(const char* from, int64_t from_stride, int64_t rows, int64_t columns, char* to,
                         int64_t to_stride) {
    if (rows == kTileRows && columns == kTileRows) return Isa::transpose16(from, from_stride, to, to_stride);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            memcpy(to + c * to_stride + r * kUnitBytes, from + r * from_stride + c * kUnitBytes, kUnitBytes);
        }
    }
}

// One stretch of as many rows of x as a block has, kPanelStride apart -> its place in the block.
template <typename Isa>
void interleave(const char* rows, int64_t columns, int64_t bytes, char* to) {
    for (int64_t at = 0; at < bytes; at += kTileRowBytes) {
        transpose<Isa>(rows + at, kPanelStride, columns, kTileRows, to + at * columns, columns * kUnitBytes);
    }
}

// Isa brings Tiles and dot<Sums, Weights, X>(), one of their products.
template <typename Isa>
struct TileProduct {
    using Tiles = typename Isa::Tiles;

    // Weights x Xs tiles of sums over `bytes` of the panel; new ones begin at zero, others where they were left.
    template <int Weights, int Xs>
    static HB_NOINLINE void multiply(const char* panel, const char* x, int64_t x_block, int64_t columns, int64_t bytes,
                                     bool is_new, char* sums, int64_t sums_row) {
        const int64_t unit_row = columns * kUnitBytes, tile = kTileRows * unit_row;
        if (is_new) {
            Tiles::template zero<0>();
            if constexpr (Xs == 2) Tiles::template zero<1>();
            if constexpr (Weights == 2) Tiles::template zero<2>();
            if constexpr (Weights == 2 && Xs == 2) Tiles::template zero<3>();
        } else {
            Tiles::template load<0>(sums, unit_row);
            if constexpr (Xs == 2) Tiles::template load<1>(sums + tile, unit_row);
            if constexpr (Weights == 2) Tiles::template load<2>(sums + sums_row, unit_row);
            if constexpr (Weights == 2 && Xs == 2) Tiles::template load<3>(sums + sums_row + tile, unit_row);
        }
        for (int64_t at = 0; at < bytes; at += kTileRowBytes, x += tile) {
            Tiles::template load<4>(panel + at, kPanelStride);
            Tiles::template load<6>(x, unit_row);
            Isa::template dot<0, 4, 6>();
            if constexpr (Xs == 2) {
                Tiles::template load<7>(x + x_block, unit_row);
                Isa::template dot<1, 4, 7>();
            }
            if constexpr (Weights == 2) {
                Tiles::template load<5>(panel + kTileRows * kPanelStride + at, kPanelStride);
                Isa::template dot<2, 5, 6>();
            }
            if constexpr (Weights == 2 && Xs == 2) Isa::template dot<3, 5, 7>();
        }
        Tiles::template store<0>(sums, unit_row);
        if constexpr (Xs == 2) Tiles::template store<1>(sums + tile, unit_row);
        if constexpr (Weights == 2) Tiles::template store<2>(sums + sums_row, unit_row);
        if constexpr (Weights == 2 && Xs == 2) Tiles::template store<3>(sums + sums_row + tile, unit_row);
    }

    // The panel, stretch `piece` of its rows, against all blocks of x -> sums[tile of weight rows][block].
    static void multiply_all(const TileBlocks& blocks, const char* panel, int64_t panel_rows, const char* x,
                             int64_t piece, bool is_new, char* sums) {
        const int64_t columns = blocks.columns, tile = kTileRows * columns * kUnitBytes;
        const int64_t sums_row = blocks.blocks * tile, bytes = blocks.piece_bytes(piece);
        const int64_t x_block = blocks.at(1, 0);
        for (int64_t b = 0; b < blocks.blocks; b += 2) {
            const char* const some = x + blocks.at(b, piece);
            for (int64_t row = 0; row < panel_rows; row += 2 * kTileRows) {
                const auto pick = panel_rows - row > kTileRows
                                      ? (blocks.blocks - b > 1 ? multiply<2, 2> : multiply<2, 1>)
                                      : (blocks.blocks - b > 1 ? multiply<1, 2> : multiply<1, 1>);
                pick(panel + row * kPanelStride, some, x_block, columns, bytes, is_new,
                     sums + row / kTileRows * sums_row + b * tile, sums_row);
            }
        }
    }
};

}  // namespace

}  // namespace hb
