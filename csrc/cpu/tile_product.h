// What the matmuls on tiles share: the product of a panel of weight rows with all of x, and how x is laid out for it.
//
// The weight rows are the left operand, read as they lie, so that decoding and copying need no second order. x is the
// right one: rows are kept together, up to sixteen, in units of four bytes (two bfloat16, four int8), and a product is
// transposed once at the end, where it is small.
//
//     panel [rows, 64 * steps bytes]      x: blocks of [16 * steps units, columns]      sums: [16, columns] a tile
//
// x is cut evenly into blocks of `columns` rows, so that one shape of tiles does for all: one row alone costs no more
// than its own bytes. Two by two tiles of sums stay in registers over a stretch of the panel, half a KB of a weight
// row: then 32 weight rows and 32 rows of x fit into the first cache together. Between stretches the sums of more rows
// wait in memory as they are, so the order in which they are added up depends on nothing but the length of a row.
//
// A product of tiles occupies no port that vectors need, and the processor looks ahead by some 500 instructions. So the
// next panel is filled row by row between the products with this one: decoding it takes as long as 32 rows of x do.
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

// One stretch of as many rows of x as a block has, kRowStride apart -> its place in the block.
template <typename Isa>
void interleave(const char* rows, int64_t columns, int64_t bytes, char* to) {
    for (int64_t at = 0; at < bytes; at += kTileRowBytes) {
        transpose<Isa>(rows + at, kRowStride, columns, kTileRows, to + at * columns, columns * kUnitBytes);
    }
}

// Fills a panel while another one is multiplied. Work brings begin(stretch), which is called first, and fill(stretch,
// i, to), which puts row i of the stretch at `to`.
template <typename Work>
class Feed {
  public:
    explicit Feed(Work& work) : work_(work) {}

    // From now on the stretch goes to `panel`, evenly over so many steps.
    void begin(const Stretch& stretch, char* panel, int64_t steps) {
        stretch_ = stretch;
        panel_ = panel;
        row_ = due_ = 0;
        steps_ = steps;
        if (stretch.rows > 0) work_.begin(stretch);
    }
    HB_INLINE void step() {
        for (due_ += stretch_.rows; due_ >= steps_; due_ -= steps_) put_row();
    }
    // All that is left, and zeros up to a whole tile.
    void finish() {
        while (row_ < stretch_.rows) put_row();
        const int64_t missing = (kTileRows - stretch_.rows % kTileRows) % kTileRows;
        memset(place(), 0, static_cast<size_t>(missing * kRowStride));
    }

  private:
    HB_INLINE char* place() const { return panel_ + row_ * kRowStride; }
    HB_INLINE void put_row() {
        work_.fill(stretch_, row_, place());
        ++row_;
    }

    Work& work_;
    Stretch stretch_{};
    char* panel_ = nullptr;
    int64_t row_ = 0, due_ = 0, steps_ = 1;
};

// Isa brings Tiles and dot<Sums, Weights, X>(), one of their products.
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
    template <int Weights, int Xs, typename Work>
    static HB_NOINLINE void multiply(const Rows& rows, const char* x, int64_t x_block, int64_t columns, int64_t bytes,
                                     const Sums& sums, Feed<Work>& feed) {
        const int64_t unit_row = columns * kUnitBytes, tile = kTileRows * unit_row;
        const char *first = rows.at, *second = rows.at + kTileRows * rows.stride;
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
            Tiles::template load<4>(first, rows.stride);
            Tiles::template load<6>(x, unit_row);
            Isa::template dot<0, 4, 6>();
            if constexpr (Xs == 2) {
                Tiles::template load<7>(x + x_block, unit_row);
                Isa::template dot<1, 4, 7>();
            }
            if constexpr (Weights == 2) {
                Tiles::template load<5>(second, rows.stride);
                second += kTileRowBytes;
                Isa::template dot<2, 5, 6>();
            }
            if constexpr (Weights == 2 && Xs == 2) Isa::template dot<3, 5, 7>();
            feed.step();
        }
        if (!sums.stores) return;
        Tiles::template store<0>(sums.at, unit_row);
        if constexpr (Xs == 2) Tiles::template store<1>(sums.at + tile, unit_row);
        if constexpr (Weights == 2) Tiles::template store<2>(sums.at + sums.row, unit_row);
        if constexpr (Weights == 2 && Xs == 2) Tiles::template store<3>(sums.at + sums.row + tile, unit_row);
    }

    // A stretch of weight rows against all blocks of x -> sums[tile of weight rows][block].
    template <typename Work>
    static void multiply_all(const TileBlocks& blocks, const Rows& rows, const Stretch& stretch, const char* x,
                             Sums sums, Feed<Work>& feed) {
        const int64_t columns = blocks.columns, tile = kTileRows * columns * kUnitBytes;
        const int64_t bytes = blocks.piece_bytes(stretch.piece), x_block = blocks.at(1, 0);
        char* const first = sums.at;
        for (int64_t b = 0; b < blocks.blocks; b += 2) {
            const char* const some = x + blocks.at(b, stretch.piece);
            for (int64_t row = 0; row < stretch.rows; row += 2 * kTileRows) {
                const auto pick = stretch.rows - row > kTileRows
                                      ? (blocks.blocks - b > 1 ? multiply<2, 2, Work> : multiply<2, 1, Work>)
                                      : (blocks.blocks - b > 1 ? multiply<1, 2, Work> : multiply<1, 1, Work>);
                sums.at = first + row / kTileRows * sums.row + b * tile;
                pick({rows.at + row * rows.stride, rows.stride}, some, x_block, columns, bytes, sums, feed);
            }
        }
    }

    // Weight rows [first, last) against all of x, a panel at a time. Work is what Feed asks for. It also says where a
    // stretch's rows can be multiplied as they lie (where, stride), or null; with which stretches sums begin anew
    // (is_new), and after which they are wanted (is_wanted): then they are in `sums`, and it takes them (take).
    template <typename Work>
    static void run(const TileBlocks& blocks, const char* x, int64_t first, int64_t last, char* panels, char* sums,
                    Work& work) {
        const int64_t sums_row = blocks.blocks * kTileRows * blocks.columns * kUnitBytes;
        const bool keeps = blocks.keeps_sums();
        const auto panel = [&](int64_t turn) { return panels + turn % kPanels * blocks.panel_bytes(); };
        if (first >= last) return;
        Stretch now = {first, rows_from(blocks, first, last), 0};
        Feed<Work> feed(work);
        feed.begin(now, panel(0), 1);
        feed.finish();
        for (int64_t turn = 0; now.rows > 0; ++turn) {
            const Stretch next = after(blocks, now, last);
            const int64_t calls = (blocks.blocks + 1) / 2 * ((now.rows + 2 * kTileRows - 1) / (2 * kTileRows));
            const int64_t steps = calls * (blocks.piece_bytes(now.piece) / kTileRowBytes);
            feed.begin(next, panel(turn + 1), steps);
            const bool is_wanted = work.is_wanted(now.piece);
            const char* const where = work.where(now);
            const Rows rows = where == nullptr ? Rows{panel(turn), kRowStride} : Rows{where, work.stride()};
            multiply_all(blocks, rows, now, x,
                         Sums{sums, sums_row, work.is_new(now.piece), !keeps, !keeps || is_wanted}, feed);
            feed.finish();
            if (is_wanted) work.take(now, sums);
            now = next;
        }
    }

  private:
    static int64_t rows_from(const TileBlocks& blocks, int64_t n, int64_t last) {
        return last - n < blocks.panel_rows() ? last - n : blocks.panel_rows();
    }
    // What is multiplied next: the panel's next stretch, or the first one of the next panel.
    static Stretch after(const TileBlocks& blocks, const Stretch& now, int64_t last) {
        if (now.piece + 1 < blocks.pieces()) return {now.n, now.rows, now.piece + 1};
        return {now.n + now.rows, rows_from(blocks, now.n + now.rows, last), 0};
    }
};

}  // namespace

}  // namespace hb
