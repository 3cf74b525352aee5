// The sizes of matmuls on tiles: how rows of x are cut into blocks, and how much room a panel and its sums take. What
// is computed with them is in tile_product.h.
#pragma once

#include <stdint.h>

#include "clones.h"

namespace hb {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kStretchBytes = 512;
constexpr int64_t kRowStride = kStretchBytes + 64;  // from a row of a panel to the next: an odd number of cache lines
constexpr int64_t kPanelRows = 32;                  // weight rows whose stretch stays in the first cache
constexpr int64_t kCachedBytes = 3 << 19;           // of x, that stay in the second: all of it passes by each panel
constexpr int64_t kFewestRows = 64;                 // of x, that are worth decoding a panel for
constexpr int64_t kUnitBytes = 4;

// How some rows of x are kept for tiles.
struct TileBlocks {
    int64_t blocks;   // of rows
    int64_t columns;  // rows in a block: the columns of a tile
    int64_t bytes;    // of a padded row, a multiple of 64

    // Powers of two, so that no row of a tile lies across two cache lines: 15 columns take a tenth longer than 16.
    static HB_INLINE int64_t columns_for(int64_t rows) {
        int64_t columns = rows == 0 ? 0 : 1;
        while (columns < rows && columns < kTileRows) columns *= 2;
        return columns;
    }

    TileBlocks() = default;
    HB_INLINE TileBlocks(int64_t rows, int64_t row_bytes)
        : blocks((rows + kTileRows - 1) / kTileRows),
          columns(columns_for(rows)),
          bytes((row_bytes + kTileRowBytes - 1) / kTileRowBytes * kTileRowBytes) {}
    HB_INLINE int64_t x_bytes() const { return blocks * columns * bytes; }
    HB_INLINE int64_t pieces() const { return (bytes + kStretchBytes - 1) / kStretchBytes; }
    // Where stretch `piece` of a block begins.
    HB_INLINE int64_t at(int64_t block, int64_t piece) const {
        return columns * (block * bytes + piece * kStretchBytes);
    }
    HB_INLINE int64_t piece_bytes(int64_t piece) const {
        const int64_t left = bytes - piece * kStretchBytes;
        return left < kStretchBytes ? left : kStretchBytes;
    }
    // Few rows of x have all their sums in tiles from the first stretch to the last.
    HB_INLINE bool keeps_sums() const { return blocks <= 2; }
    HB_INLINE int64_t panel_bytes() const { return kPanelRows * kRowStride; }
    // Of four bytes each. Rows of tiles are read to a whole tile's width, also the last one.
    HB_INLINE int64_t sums() const { return kPanelRows * blocks * columns + kTileRows; }
};

// How many rows of so many bytes are best multiplied together, up to `most`; whole pairs of blocks.
HB_INLINE int64_t rows_in_cache(int64_t row_bytes, int64_t most) {
    constexpr int64_t kPair = 2 * kTileRows;
    const int64_t fitting = row_bytes == 0 ? most : kCachedBytes / row_bytes / kPair * kPair;
    return fitting < kFewestRows ? kFewestRows : fitting < most ? fitting : most;
}

// A stretch of some weight rows, as many as a panel holds.
struct Stretch {
    int64_t n, rows;  // rows [n, n + rows); none behind the last one
    int64_t piece;
};

}  // namespace hb
