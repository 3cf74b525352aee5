// What the matmuls on tiles share: the product of a panel of weight rows with all of x, and how x is laid out for it.
//
// The weight rows are the left operand, read as they lie, so that decoding and copying need no second order. x is the
// right one: rows are kept together, up to sixteen, in units of four bytes (two bfloat16, four int8), and a product is
// transposed once at the end, where it is small.
//
//     panel [rows, 64 * steps bytes]      x: blocks of [16 * steps units, columns]      sums: [16, columns] a tile
//
// x is cut into blocks of sixteen rows, the last one filled up with zeros. A few rows are one block with as many
// columns as the next power of two, so that one row alone costs no more than its own bytes. Two by two tiles of sums
// stay in registers over a stretch of the panel, half a KB of a weight row: then 32 weight rows and 32 rows of x fit
// into the first cache together. Between stretches the sums of more rows wait in memory as they are, so the order in
// which they are added up depends on nothing but the length of a row.
//
// A panel is 32 weight rows: it is filled, then multiplied with x, of which so many rows are taken at a time as stay in
// the second cache. Filling the next one between the products cost several times what it does alone.
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

// One stretch of as many rows of x as a block has, kRowStride apart, with room for kTileRows -> its place in the block.
template <typename Isa>
void interleave(const char* rows, int64_t columns, int64_t bytes, char* to) {
    const int64_t unit_row = columns * kUnitBytes;
    for (int64_t at = 0; at < bytes; at += kTileRowBytes, to += kTileRows * unit_row) {
        if (columns == kTileRows) {
            Isa::transpose16(rows + at, kRowStride, to, unit_row);
            continue;
        }
        alignas(64) char tile[kTileRows * kTileRowBytes];
        Isa::transpose16(rows + at, kRowStride, tile, kTileRowBytes);
        for (int64_t k = 0; k < kTileRows; ++k) {
            memcpy(to + k * unit_row, tile + k * kTileRowBytes, static_cast<size_t>(unit_row));
        }
    }
}

// Bytes that are fetched for later while tiles are multiplied, some lines a step.
class Fetching {
  public:
    Fetching(const char* at, int64_t rows, int64_t stride, int64_t bytes, int64_t steps)
        : at_(at),
          stride_(stride),
          row_lines_((bytes + 63) / 64),
          lines_(at == nullptr ? 0 : rows * row_lines_),
          step_(steps == 0 ? 0 : (lines_ + steps - 1) / steps) {}
    HB_INLINE void step() {
        for (int64_t end = done_ + step_ < lines_ ? done_ + step_ : lines_; done_ < end; ++done_) {
            __builtin_prefetch(at_ + 64 * line_, 0, 2);
            if (++line_ == row_lines_) line_ = 0, at_ += stride_;
        }
    }

  private:
    const char* at_;
    int64_t stride_, row_lines_, lines_, step_, line_ = 0, done_ = 0;
};

// Isa brings Tiles and dot<Sums, Weights, X>(), one of their products; and transpose16, to[c][r] = from[r][c] of
// sixteen rows of sixteen units of four bytes, whose strides are in bytes.
template <typename Isa>
struct TileProduct {
    using Tiles = typename Isa::Tiles;

    // Two by two tiles of sums, or fewer, in memory.
    struct Sums {
        char* at;
        int64_t row;  // from a tile of weight rows to the next, in bytes
        bool is_new;  // they begin at zero
        bool loads, stores;
    };

    // Weight rows of a stretch.
    struct Rows {
        const char* at;
        int64_t stride;
    };

    // Weights x Xs tiles of sums over `bytes` of the rows.
    template <int Weights, int Xs>
    static HB_NOINLINE void multiply(const Rows& rows, const char* x, int64_t x_block, int64_t columns, int64_t bytes,
                                     const Sums& sums, Fetching& fetching) {
        Fetching fetch = fetching;  // in registers: the compiler takes tiles to change all memory
        const int64_t unit_row = columns * kUnitBytes, tile = kTileRows * unit_row, stride = rows.stride;
        const char *first = rows.at, *second = first + kTileRows * stride;
        if (sums.is_new) {
            Tiles::template zero<0>();
            if constexpr (Xs == 2) Tiles::template zero<1>();
            if constexpr (Weights == 2) Tiles::template zero<2>();
            if constexpr (Weights == 2 && Xs == 2) Tiles::template zero<3>();
        } else if (sums.loads) {
            Tiles::template load<0>(sums.at, unit_row);
            if constexpr (Xs == 2) Tiles::template load<1>(sums.at + tile, unit_row);
            if constexpr (Weights == 2) Tiles::template load<2>(sums.at + sums.row, unit_row);
            if constexpr (Weights == 2 && Xs == 2) Tiles::template load<3>(sums.at + sums.row + tile, unit_row);
        }
        for (const char* const end = first + bytes; first < end; first += kTileRowBytes, x += tile) {
            Tiles::template load<4>(first, stride);
            Tiles::template load<6>(x, unit_row);
            Isa::template dot<0, 4, 6>();
            if constexpr (Xs == 2) {
                Tiles::template load<7>(x + x_block, unit_row);
                Isa::template dot<1, 4, 7>();
            }
            if constexpr (Weights == 2) {
                Tiles::template load<5>(second, stride);
                second += kTileRowBytes;
                Isa::template dot<2, 5, 6>();
            }
            if constexpr (Weights == 2 && Xs == 2) Isa::template dot<3, 5, 7>();
            fetch.step();
        }
        fetching = fetch;
        if (!sums.stores) return;
        Tiles::template store<0>(sums.at, unit_row);
        if constexpr (Xs == 2) Tiles::template store<1>(sums.at + tile, unit_row);
        if constexpr (Weights == 2) Tiles::template store<2>(sums.at + sums.row, unit_row);
        if constexpr (Weights == 2 && Xs == 2) Tiles::template store<3>(sums.at + sums.row + tile, unit_row);
    }

    // A stretch of a panel against all blocks of x -> sums[tile of weight rows][block].
    static void multiply_all(const TileBlocks& blocks, const Rows& rows, const Stretch& stretch, const char* x,
                             Sums sums, Fetching& fetching) {
        const int64_t columns = blocks.columns, tile = kTileRows * columns * kUnitBytes;
        const int64_t bytes = blocks.piece_bytes(stretch.piece), x_block = blocks.at(1, 0);
        const bool is_whole = stretch.rows > kTileRows;
        for (int64_t b = 0; b < blocks.blocks; b += 2, sums.at += 2 * tile) {
            const auto pick = is_whole ? (blocks.blocks - b > 1 ? multiply<2, 2> : multiply<2, 1>)
                                       : (blocks.blocks - b > 1 ? multiply<1, 2> : multiply<1, 1>);
            pick(rows, x + blocks.at(b, stretch.piece), x_block, columns, bytes, sums, fetching);
        }
    }

    // Weight rows [first, last) against all of x, a panel at a time. Work says where a stretch's rows can be multiplied
    // as they lie (where, stride), or null: then it puts them into the panel (fill). It says what of the next stretch
    // is to be fetched between products (fetching), with which stretches sums begin anew (is_new), and after which they
    // are wanted (is_wanted): then they are in `sums`, and it takes them (take).
    template <typename Work>
    static void run(const TileBlocks& blocks, const char* x, int64_t first, int64_t last, char* panel, char* sums,
                    Work& work) {
        const int64_t sums_row = blocks.blocks * kTileRows * blocks.columns * kUnitBytes;
        const bool keeps = blocks.keeps_sums();
        for (int64_t n = first; n < last; n += kPanelRows) {
            const int64_t rows = last - n < kPanelRows ? last - n : kPanelRows;
            int64_t piece = 0;
            do {  // once where rows are empty: their sums are zeros
                const Stretch now = {n, rows, piece};
                const char* const where = work.where(now);
                if (where == nullptr) {
                    work.fill(now, panel);
                    fill_up(rows, panel);
                }
                const bool is_wanted = work.is_wanted(piece);
                const int64_t steps = (blocks.blocks + 1) / 2 * (blocks.piece_bytes(piece) / kTileRowBytes);
                Fetching fetching = work.fetching(after(blocks, now), steps);
                multiply_all(blocks, where == nullptr ? Rows{panel, kRowStride} : Rows{where, work.stride()}, now, x,
                             Sums{sums, sums_row, work.is_new(piece), !keeps, !keeps || is_wanted}, fetching);
                if (is_wanted) work.take(now, sums);
            } while (++piece < blocks.pieces());
        }
    }

  private:
    // What is multiplied next: the panel's next stretch, or the first one of the next panel, which may not be there.
    static Stretch after(const TileBlocks& blocks, const Stretch& now) {
        if (now.piece + 1 < blocks.pieces()) return {now.n, now.rows, now.piece + 1};
        return {now.n + now.rows, now.rows, 0};
    }
    // Zeros behind the rows of a panel up to a whole tile.
    static void fill_up(int64_t rows, char* panel) {
        const int64_t missing = (kTileRows - rows % kTileRows) % kTileRows;
        memset(panel + rows * kRowStride, 0, static_cast<size_t>(missing * kRowStride));
    }
};

}  // namespace

}  // namespace hb
