// bfloat16 activations times decoded weights on tiles, written once: decoded_amx.cpp compiles it for the processor, the
// C tests for tiles in plain C++. An Isa brings the tiles and the vectors that decode, one Isa for 4-bit and one for
// int8 codes; what decoding means, and the order of decoded values, are those of decoded_kernel.h.
//
// A panel of weight rows is decoded a stretch at a time into the cache and meets x there (tile_product.h). The
// sum of one row and one column is added up over the stretches, by one instruction per 32 values, whatever the number
// of rows: the instruction adds 16 products of even and 16 of odd places, then both to the sum.
//
// Everything is in an unnamed namespace, as in decoded_kernel.h and for the same reason.
#pragma once

#include <stdint.h>
#include <string.h>

#include "decode4.h"
#include "fetch.h"
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
        alignas(64) char rows[kTileRows * kRowStride];
        for (int64_t r = 0; r < columns; ++r) {
            uint16_t* const to = reinterpret_cast<uint16_t*>(rows + r * kRowStride);
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

    // What follows decodes `count` values of a weight row, padded with zeros to whole groups.

    static void decode_int8(const uint8_t* codes, int64_t count, char* to) {
        for (int64_t i = 0; i < count; i += kGroup, to += 2 * kTileRowBytes) {
            uint8_t tail[kGroup] = {};
            const uint8_t* some = codes + i;
            if (count - i < kGroup) {
                memcpy(tail, some, static_cast<size_t>(count - i));
                some = tail;
            }
            store_group(some, Table{}, to);
        }
    }

    // Whole groups, `block` values under each absmax. Sizes of blocks are powers of two, so that a block begins with
    // the stretch or holds all of it.
    static HB_INLINE void decode_blocks(const uint8_t* packed, int64_t count, int64_t block, const Table& base,
                                        const float* absmax, char* to) {
        for (int64_t i = 0; i < count; ++absmax) {
            const Table table = Isa::scaled(base, *absmax);
            for (const int64_t end = i + block; i < end;
                 i += kGroup, packed += kGroup / kCodes, to += 2 * kTileRowBytes) {
                store_group(packed, table, to);
            }
        }
    }

    // Wherever the row begins and its blocks end, by way of float32 values in the natural order.
    static HB_NOINLINE void decode_anyhow(const DecodedCall& a, int64_t n, int64_t k, int64_t count,
                                          const float* absmax, char* to) {
        float values[kStretch];
        uint16_t rounded[kStretch];
        decode4(pair_table(a.weight.format), a.weight.codes, absmax, a.weight.blocksize, n * a.K + k, count, values);
        for (int64_t i = 0; i < count; ++i) rounded[i] = to_bfloat(values[i]);
        regroup(rounded, count, (count + kGroup - 1) / kGroup * kGroup, reinterpret_cast<uint16_t*>(to));
    }

    // A group is two lines of a row.
    static HB_INLINE void store_group(const uint8_t* codes, const Table& table, char* to) {
        Vector first, second;
        Isa::decode(codes, table, first, second);
        Isa::store(reinterpret_cast<uint16_t*>(to), first);
        Isa::store(reinterpret_cast<uint16_t*>(to + kTileRowBytes), second);
    }

    // The absmax of rows [n, n + rows) from their first block on: where they lie, or in `room`. Fetches as many that
    // follow.
    static const float* absmax_of(const DecodedCall& a, int64_t n, int64_t rows, float* room) {
        if (a.K == 0) return room;
        const AbsmaxSource& source = a.weight.absmax;
        const int64_t first = n * a.K / a.weight.blocksize, last = ((n + rows) * a.K - 1) / a.weight.blocksize;
        fetch_absmax(source, last + 1, last + 1 - first);
        return absmax_at(source, first, last - first + 1, room);
    }

    // --- the whole: weight rows [begin, end) x kPanelRows ------------------------------------------------------

    // What TileProduct asks for.
    struct Work {
        const TiledJob& job;
        float* const room;  // for the absmax of a panel
        Table table{};
        bool is_aligned = false;                // rows begin with a block and are whole groups
        int64_t row_bytes = 0, row_blocks = 0;  // of an aligned row, or one of int8
        const float* absmax = nullptr;          // of the panel's first block

        Work(const TiledJob& of, float* absmax_room) : job(of), room(absmax_room), row_bytes(of.call->K / kCodes) {
            if constexpr (!Isa::kIsInt8) {
                const int64_t K = of.call->K, blocksize = of.call->weight.blocksize;
                table = Isa::table(of.call->weight.format == HB_NF4 ? kNf4Values.at : kFp4Values.at);
                is_aligned = K % blocksize == 0 && blocksize % kGroup == 0;
                row_blocks = K / blocksize;
            }
        }

        void fill(const Stretch& at, char* panel) {
            const DecodedCall& a = *job.call;
            const int64_t k = at.piece * kStretch, count = values_in(a, at.piece);
            const uint8_t* const codes = a.weight.codes + (at.n * a.K + k) / kCodes;
            if constexpr (Isa::kIsInt8) {
                for (int64_t i = 0; i < at.rows; ++i) {
                    const uint8_t* const own = codes + i * row_bytes;
                    fetch(own, count);
                    decode_int8(own, count, panel + i * kRowStride);
                }
            } else {
                if (at.piece == 0) absmax = absmax_of(a, at.n, at.rows, room);
                if (!is_aligned) return fill_anyhow(at, k, count, panel);
                const float* const scales = absmax + k / a.weight.blocksize;
                const int64_t block = count < a.weight.blocksize ? count : a.weight.blocksize;
                if (block == kGroup && count == kStretch) {  // known to the compiler, the usual sizes need no loops
                    fill_rows(at.rows, codes, kStretch, kGroup, scales, panel);
                } else {
                    fill_rows(at.rows, codes, count, block, scales, panel);
                }
            }
        }

        HB_INLINE void fill_rows(int64_t rows, const uint8_t* codes, int64_t count, int64_t block, const float* scales,
                                 char* to) const {
            const Table base = table;
            for (int64_t i = 0; i < rows; ++i, codes += row_bytes, scales += row_blocks, to += kRowStride) {
                fetch(codes, count);
                decode_blocks(codes, count, block, base, scales, to);
            }
        }

        // Each row lies apart in memory, so that the processor does not see what comes next. Where there are few
        // products to fetch between (fetching), the codes of a row are fetched here, a panel ahead.
        HB_INLINE void fetch(const uint8_t* row, int64_t count) const {
            if (!job.blocks.keeps_sums()) return;
            const uint8_t* const next = row + kPanelRows * row_bytes;
            for (int64_t i = 0; i < count / kCodes; i += 64) __builtin_prefetch(next + i, 0, 2);
        }

        void fill_anyhow(const Stretch& at, int64_t k, int64_t count, char* to) const {
            const int64_t blocksize = job.call->weight.blocksize, K = job.call->K;
            for (int64_t n = at.n; n < at.n + at.rows; ++n, to += kRowStride) {
                const float* const own = absmax + ((n * K + k) / blocksize - at.n * K / blocksize);
                decode_anyhow(*job.call, n, k, count, own, to);
            }
        }

        static const char* where(const Stretch&) { return nullptr; }
        Fetching fetching(const Stretch& next, int64_t steps) const {
            if (job.blocks.keeps_sums()) return {nullptr, 0, 0, 0, steps};
            const DecodedCall& a = *job.call;
            const uint8_t* const codes = a.weight.codes + (next.n * a.K + next.piece * kStretch) / kCodes;
            const int64_t bytes = values_in(a, next.piece) / kCodes;
            return {reinterpret_cast<const char*>(codes), next.rows, row_bytes, bytes, steps};
        }
        static int64_t stride() { return 0; }
        bool is_new(int64_t piece) const { return piece == 0; }
        bool is_wanted(int64_t piece) const { return piece + 1 >= job.blocks.pieces(); }
        void take(const Stretch& at, const char* sums) { finish(job, at.n, at.rows, sums); }
    };

    static void run(const TiledJob& job, int64_t begin, int64_t end, char* scratch) {
        const DecodedCall& a = *job.call;
        const TileScope<typename Isa::Tiles> scope(job.blocks.columns);
        const TiledScratch parts(job.blocks, a);
        Work work(job, reinterpret_cast<float*>(scratch + parts.panel));
        const int64_t last = end * kPanelRows < a.N ? end * kPanelRows : a.N;
        TileProduct<Isa>::run(job.blocks, job.x, begin * kPanelRows, last, scratch,
                              scratch + parts.panel + parts.absmax, work);
    }

    // Transposed, bias on top and rounded: sums -> out[first_row ..][n .. n + columns].
    static void finish(const TiledJob& job, int64_t n, int64_t columns, const char* sums) {
        const DecodedCall& a = *job.call;
        const int64_t unit_row = job.blocks.columns * kUnitBytes, tile = kTileRows * unit_row;
        alignas(64) float out[kTileRows * kPanelRows];
        float bias[kPanelRows];
        if (a.bias != nullptr) load_floats(a.bias, a.bias_dtype, n, columns, bias);
        for (int64_t b = 0; b < job.blocks.blocks; ++b) {
            for (int64_t i = 0; i < columns; i += kTileRows) {
                const char* const from = sums + (i / kTileRows * job.blocks.blocks + b) * tile;
                Isa::transpose16(from, unit_row, reinterpret_cast<char*>(out + i), kPanelRows * kUnitBytes);
            }
            const int64_t row = b * job.blocks.columns;
            for (int64_t r = 0; r < job.blocks.columns && row + r < job.rows; ++r) {
                finish_row(a, job.first_row + row + r, n, columns, a.bias == nullptr ? nullptr : bias,
                           out + r * kPanelRows);
            }
        }
    }

    static HB_INLINE void finish_row(const DecodedCall& a, int64_t row, int64_t n, int64_t columns, const float* bias,
                                     float* sums) {
        if constexpr (Isa::kIsInt8) {
            const float* const absmax = static_cast<const float*>(a.weight.absmax.absmax) + n;
            for (int64_t i = 0; i < columns; ++i) sums[i] *= absmax[i] / kInt8Max;
        }
        for (int64_t i = 0; bias != nullptr && i < columns; ++i) sums[i] += bias[i];
        uint16_t* const out = static_cast<uint16_t*>(a.out) + row * a.out_stride + n;
        if (columns == kPanelRows) return Isa::round_panel(sums, out);
        for (int64_t i = 0; i < columns; ++i) out[i] = to_bfloat(sums[i]);
    }
};

template <typename Isa>
constexpr TiledKernels tiled_kernels() {
    return {Tiled<Isa>::load_x, Tiled<Isa>::run};
}

}  // namespace

}  // namespace hb
