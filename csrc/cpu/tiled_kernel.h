// bfloat16 activations times decoded weights on tiles, written once: decoded_amx.cpp compiles it for the processor, the
// C tests for tiles in plain C++. An Isa brings the tiles and the vectors that decode, one Isa for 4-bit and one for
// int8 codes; what decoding means, and the order of decoded values, are those of decoded_kernel.h.
//
// A panel of weight rows is decoded a stretch at a time into the cache and meets all of x there (tile_product.h). The
// sum of one row and one column is added up over the stretches, by one instruction per 32 values, whatever the number
// of rows: the instruction adds 16 products of even and 16 of odd places, then both to the sum.
//
// Everything is in an unnamed namespace, as in decoded_kernel.h and for the same reason.
#pragma once

#include <stdint.h>
#include <string.h>

#include "decode4.h"
#include "floats.h"
#include "formats.h"
#include "tile_product.h"
#include "tiled.h"

namespace hb {

namespace {

template <typename Isa>
struct Tiled {
    using Vector = typename Isa::Vector;
    using Table = typename Isa::Table;

    static constexpr int64_t kGroup = 64;  // values decoded at a time
    static constexpr int64_t kHalf = kGroup / 2;
    static constexpr int64_t kCodes = Isa::kIsInt8 ? 1 : 2;  // in a byte
    static constexpr int64_t kStretch = kStretchBytes / static_cast<int64_t>(sizeof(uint16_t));
    static_assert(Isa::kGroup == kGroup, "x is kept in the order of this group");

    // `count` values -> whole groups in decoded order, the rest zero.
    static HB_INLINE void regroup(const uint16_t* values, int64_t count, int64_t padded, uint16_t* out) {
        for (int64_t k = 0; k < padded; k += kGroup) {
            uint16_t tail[kGroup] = {};
            const uint16_t* some = values + k;
            if (count - k < kGroup) {
                memcpy(tail, some, static_cast<size_t>(count - k) * sizeof(uint16_t));
                some = tail;
            }
            for (int64_t i = 0; i < kHalf; ++i) {
                out[k + i] = some[Isa::kIsInt8 ? i : 2 * i];
                out[k + kHalf + i] = some[Isa::kIsInt8 ? i + kHalf : 2 * i + 1];
            }
        }
    }

    static int64_t values_in(const DecodedCall& a, int64_t piece) {
        const int64_t left = a.K - piece * kStretch;
        return left < kStretch ? left : kStretch;
    }

    static void load_x(const TiledJob& job, int64_t block, int64_t piece) {
        const DecodedCall& a = *job.call;
        const int64_t bytes = job.blocks.piece_bytes(piece), columns = job.blocks.columns;
        alignas(64) char rows[kTileRows * kPanelStride];
        for (int64_t r = 0; r < columns; ++r) {
            uint16_t* const to = reinterpret_cast<uint16_t*>(rows + r * kPanelStride);
            const int64_t row = block * columns + r;
            if (row < job.rows) {
                const uint16_t* const x = static_cast<const uint16_t*>(a.x) + (job.first_row + row) * a.K;
                regroup(x + piece * kStretch, values_in(a, piece), bytes / 2, to);
            } else {
                memset(to, 0, static_cast<size_t>(bytes));
            }
        }
        interleave<Isa>(rows, columns, bytes, job.x + job.blocks.at(block, piece));
    }

    // --- decoding into the panel ----------------------------------------------------------------------------------

    // What follows decodes values [k, k + count) of weight row n, padded with zeros to whole groups.

    static void decode_int8(const DecodedCall& a, int64_t n, int64_t k, int64_t count, int64_t ahead, uint16_t* out) {
        const uint8_t* const codes = a.weight.codes + n * a.K + k;
        for (int64_t i = 0; i < count; i += kGroup) {
            uint8_t tail[kGroup] = {};
            const uint8_t* some = codes + i;
            __builtin_prefetch(some + ahead, 0, 2);
            if (count - i < kGroup) {
                memcpy(tail, some, static_cast<size_t>(count - i));
                some = tail;
            }
            store_group(some, Table{}, out + i);
        }
    }

    // A row that begins with a block. absmax: of the block that k is in. Sizes of blocks are powers of two, so that one
    // begins at k or holds the whole stretch.
    static void decode_aligned(const DecodedCall& a, int64_t n, int64_t k, int64_t count, const float* absmax,
                               int64_t ahead, uint16_t* out) {
        const Table base = Isa::table(a.weight.format == HB_NF4 ? kNf4Values.at : kFp4Values.at);
        const uint8_t* const packed = a.weight.codes + (n * a.K + k) / kCodes;
        const int64_t run = count < a.weight.blocksize ? count : a.weight.blocksize;
        for (int64_t i = 0; i < count; ++absmax) {
            const Table table = Isa::scaled(base, *absmax);
            for (const int64_t end = i + run; i < end; i += kGroup) {
                __builtin_prefetch(packed + i / kCodes + ahead, 0, 2);
                store_group(packed + i / kCodes, table, out + i);
            }
        }
    }

    // Wherever the row begins and its blocks end, by way of float32 values in the natural order.
    static void decode_anyhow(const DecodedCall& a, int64_t n, int64_t k, int64_t count, const float* absmax,
                              uint16_t* out) {
        float values[kStretch];
        uint16_t rounded[kStretch];
        decode4(pair_table(a.weight.format), a.weight.codes, absmax, a.weight.blocksize, n * a.K + k, count, values);
        for (int64_t i = 0; i < count; ++i) rounded[i] = to_bfloat(values[i]);
        regroup(rounded, count, (count + kGroup - 1) / kGroup * kGroup, out);
    }

    static HB_INLINE void store_group(const uint8_t* codes, const Table& table, uint16_t* out) {
        Vector first, second;
        Isa::decode(codes, table, first, second);
        Isa::store(out, first);
        Isa::store(out + kHalf, second);
    }

    static bool is_aligned(const DecodedCall& a) {
        return a.K % a.weight.blocksize == 0 && a.weight.blocksize % kGroup == 0;
    }

    // The absmax of rows [n, n + rows) from their first block on: where they lie, or in `room`.
    static const float* absmax_of(const DecodedCall& a, int64_t n, int64_t rows, float* room) {
        if (Isa::kIsInt8 || a.K == 0) return nullptr;
        const AbsmaxSource& source = a.weight.absmax;
        const int64_t first = n * a.K / a.weight.blocksize, last = ((n + rows) * a.K - 1) / a.weight.blocksize;
        if (source.nested_absmax == nullptr) return static_cast<const float*>(source.absmax) + first;
        load_absmax(source, first, last - first + 1, room);
        return room;
    }

    // Stretch `piece` of weight rows [n, n + rows), and zeros up to a whole tile. While few rows are decoded at a time
    // each lies apart in memory, so that the processor does not see what comes next: the next panel's are fetched.
    static void fill_panel(const DecodedCall& a, int64_t n, int64_t rows, int64_t piece, const float* absmax,
                           char* panel) {
        const int64_t k = piece * kStretch, count = values_in(a, piece), ahead = rows * a.K / kCodes;
        for (int64_t i = 0; i < rows; ++i, panel += kPanelStride) {
            uint16_t* const out = reinterpret_cast<uint16_t*>(panel);
            if constexpr (Isa::kIsInt8) {
                decode_int8(a, n + i, k, count, ahead, out);
            } else {
                const int64_t blocksize = a.weight.blocksize, first = n * a.K / blocksize;
                const float* const own = absmax + (((n + i) * a.K + k) / blocksize - first);
                if (is_aligned(a)) {
                    decode_aligned(a, n + i, k, count, own, ahead, out);
                } else {
                    decode_anyhow(a, n + i, k, count, own, out);
                }
            }
        }
        const int64_t missing = (kTileRows - rows % kTileRows) % kTileRows;
        memset(panel, 0, static_cast<size_t>(missing * kPanelStride));
    }

    // --- the whole: weight rows [begin, end) x kTileRows ----------------------------------------------------------

    static void run(const TiledJob& job, int64_t begin, int64_t end, char* scratch) {
        const DecodedCall& a = *job.call;
        const TileScope<typename Isa::Tiles> scope(job.blocks.columns);
        const TiledScratch parts(job.blocks, a);
        char* const panel = scratch;
        float* const room = reinterpret_cast<float*>(scratch + parts.panel);
        char* const sums = scratch + parts.panel + parts.absmax;
        const int64_t last = end * kTileRows < a.N ? end * kTileRows : a.N;
        for (int64_t n = begin * kTileRows; n < last; n += job.blocks.panel_rows()) {
            const int64_t left = last - n, rows = left < job.blocks.panel_rows() ? left : job.blocks.panel_rows();
            const float* const absmax = absmax_of(a, n, rows, room);
            if (a.K == 0) memset(sums, 0, static_cast<size_t>(parts.sums));
            for (int64_t piece = 0; piece < job.blocks.pieces(); ++piece) {
                fill_panel(a, n, rows, piece, absmax, panel);
                TileProduct<Isa>::multiply_all(job.blocks, panel, rows, job.x, piece, piece == 0, sums);
            }
            finish(job, n, rows, sums);
        }
    }

    // Transposed, bias on top and rounded: sums -> out[first_row ..][n .. n + columns].
    static void finish(const TiledJob& job, int64_t n, int64_t columns, const char* sums) {
        const int64_t unit_row = job.blocks.columns * kUnitBytes, tile = kTileRows * unit_row;
        alignas(64) float out[kTileRows * kMostPanelRows];
        constexpr int64_t kOutRow = kMostPanelRows * int64_t{sizeof(float)};
        for (int64_t b = 0; b < job.blocks.blocks; ++b) {
            for (int64_t i = 0; i < columns; i += kTileRows) {
                const char* const from = sums + (i / kTileRows * job.blocks.blocks + b) * tile;
                transpose<Isa>(from, unit_row, kTileRows, job.blocks.columns, reinterpret_cast<char*>(out + i),
                               kOutRow);
            }
            const int64_t row = b * job.blocks.columns;
            for (int64_t r = 0; r < job.blocks.columns && row + r < job.rows; ++r) {
                finish_row(*job.call, job.first_row + row + r, n, columns, out + r * kMostPanelRows);
            }
        }
    }

    static void finish_row(const DecodedCall& a, int64_t row, int64_t n, int64_t columns, float* out) {
        if constexpr (Isa::kIsInt8) {
            const float* const absmax = static_cast<const float*>(a.weight.absmax.absmax) + n;
            for (int64_t i = 0; i < columns; ++i) out[i] *= absmax[i] / kInt8Max;
        }
        if (a.bias != nullptr) {
            for (int64_t i = 0; i < columns; ++i) out[i] += load_float(a.bias, a.bias_dtype, n + i);
        }
        store_floats(out, columns, a.out, a.x_dtype, row * a.out_stride + n);
    }
};

template <typename Isa>
constexpr TiledKernels tiled_kernels() {
    return {Tiled<Isa>::load_x, Tiled<Isa>::run};
}

}  // namespace

}  // namespace hb
