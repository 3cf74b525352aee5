// LLM.int8() on tiles, written once: linear8_amx.cpp compiles it for the processor, the C tests for tiles in plain C++.
// Rows of x are split, and outliers meet the weight, as linear8_kernel.h has it; only the exact product is another, of
// signed codes (tile_product.h). Its sums are exact, so every bit is that of the other levels.
//
// A panel of weight rows is copied a stretch at a time into the cache, padded with zeros, and meets all of x there.
//
// Everything is in an unnamed namespace, as in linear8_kernel.h and for the same reason.
#pragma once

#include <stdint.h>
#include <string.h>

#include "linear8_kernel.h"
#include "tile_product.h"

namespace hb {

namespace {

template <typename Isa>
struct Tiled8 : Linear8<Isa> {
    using Base = Linear8<Isa>;
    static_assert(Isa::kOffset == 0, "codes of x are signed");
    // Of a row, until its sums, of at most 128 * 128 each, leave int32.
    static constexpr int64_t kExactPieces = kExactTerms8 / kStretchBytes;

    static void interleave_rows(const Job8& job, int64_t block, int64_t piece) {
        const int64_t bytes = job.blocks.piece_bytes(piece), columns = job.blocks.columns;
        alignas(64) char rows[kTileRows * kPanelStride];
        for (int64_t r = 0; r < columns; ++r) {
            const int64_t row = block * columns + r;
            char* const to = rows + r * kPanelStride;
            if (row < job.rows) {
                memcpy(to, job.codes + row * job.stride + piece * kStretchBytes, static_cast<size_t>(bytes));
            } else {
                memset(to, 0, static_cast<size_t>(bytes));
            }
        }
        interleave<Isa>(rows, columns, bytes, job.tiles + job.blocks.at(block, piece));
    }

    // Stretch `piece` of weight rows [n, n + rows), and zeros up to a whole tile; the next panel's are fetched.
    static void fill_panel(const hb_linear8_args& a, int64_t n, int64_t rows, int64_t piece, int64_t bytes,
                           char* panel) {
        const int64_t k = piece * kStretchBytes, count = a.K - k < bytes ? a.K - k : bytes;
        for (int64_t i = 0; i < rows; ++i, panel += kPanelStride) {
            const int8_t* const codes = a.codes + (n + i) * a.K + k;
            for (int64_t at = 0; at < count; at += 64) __builtin_prefetch(codes + rows * a.K + at, 0, 2);
            memcpy(panel, codes, static_cast<size_t>(count));
            memset(panel + count, 0, static_cast<size_t>(bytes - count));
        }
        const int64_t missing = (kTileRows - rows % kTileRows) % kTileRows;
        memset(panel, 0, static_cast<size_t>(missing * kPanelStride));
    }

    struct Scratch {
        char* panel;
        int32_t* sums;
        int64_t* exact;  // where rows are so long that int32 does not hold their sums, else null
        Scratch(const Job8& job, char* from)
            : panel(from),
              sums(reinterpret_cast<int32_t*>(from + job.blocks.panel_rows() * kPanelStride)),
              exact(job.args->K > kExactTerms8 ? reinterpret_cast<int64_t*>(sums + job.blocks.sums()) : nullptr) {}
    };

    // Weight rows [n, n + rows) against all of x.
    static void add_up(const Job8& job, int64_t n, int64_t rows, const Scratch& scratch) {
        const hb_linear8_args& a = *job.args;
        const int64_t pieces = job.blocks.pieces();
        const int64_t count = (rows + kTileRows - 1) / kTileRows * kTileRows * job.blocks.blocks * job.blocks.columns;
        if (a.K == 0) memset(scratch.sums, 0, static_cast<size_t>(count) * sizeof(int32_t));
        if (scratch.exact != nullptr) memset(scratch.exact, 0, static_cast<size_t>(count) * sizeof(int64_t));
        for (int64_t piece = 0; piece < pieces; ++piece) {
            fill_panel(a, n, rows, piece, job.blocks.piece_bytes(piece), scratch.panel);
            TileProduct<Isa>::multiply_all(job.blocks, scratch.panel, rows, job.tiles, piece, piece % kExactPieces == 0,
                                           reinterpret_cast<char*>(scratch.sums));
            if (scratch.exact != nullptr && (piece % kExactPieces == kExactPieces - 1 || piece == pieces - 1)) {
                for (int64_t i = 0; i < count; ++i) scratch.exact[i] += scratch.sums[i];
            }
        }
    }

    // Rows of x of block `b`, weight rows [i, i + columns) of the panel: their sums, transposed, as float32.
    static void load_sums(const Job8& job, const Scratch& scratch, int64_t b, int64_t i, int64_t columns, float* out) {
        const int64_t wide = job.blocks.columns;
        for (int64_t c = 0; c < columns; c += kTileRows) {
            const int64_t first = ((i + c) / kTileRows * job.blocks.blocks + b) * kTileRows * wide;
            if (scratch.exact != nullptr) {
                for (int64_t n = 0; n < kTileRows; ++n) {
                    for (int64_t r = 0; r < wide; ++r) {
                        out[r * kTileColumns + c + n] = static_cast<float>(scratch.exact[first + n * wide + r]);
                    }
                }
                continue;
            }
            alignas(64) int32_t sums[kTileRows * kTileRows];
            transpose<Isa>(reinterpret_cast<const char*>(scratch.sums + first), wide * kUnitBytes, kTileRows, wide,
                           reinterpret_cast<char*>(sums), kTileRows * kUnitBytes);
            for (int64_t r = 0; r < wide; ++r) {
                for (int64_t n = 0; n < kTileRows; ++n) {
                    out[r * kTileColumns + c + n] = static_cast<float>(sums[r * kTileRows + n]);
                }
            }
        }
    }

    // `columns` weight rows from the panel's row i on, which is row n: scales, outliers, bias, rounding.
    static void finish_columns(const Job8& job, const Scratch& scratch, int64_t n, int64_t i, int64_t columns,
                               const float* totals) {
        const hb_linear8_args& a = *job.args;
        alignas(64) float out[kTileRows * kTileColumns];
        for (int64_t b = 0; b < job.blocks.blocks; ++b) {
            load_sums(job, scratch, b, i, columns, out);
            const int64_t first = b * job.blocks.columns;
            for (int64_t r = 0; r < job.blocks.columns && first + r < job.rows; ++r) {
                const int64_t row = first + r;
                float* const own = out + r * kTileColumns;
                for (int64_t c = 0; c < columns; ++c) {
                    const float product = own[c] * job.row_absmax[row];
                    own[c] = product * a.absmax[n + c] * kInt8ProductScale;
                }
                Base::finish(job, row, n, columns, totals + row * kTileColumns, own);
            }
        }
    }

    static void run(const Job8& job, int64_t begin, int64_t end, float* room) {
        const hb_linear8_args& a = *job.args;
        const TileScope<typename Isa::Tiles> scope(job.blocks.columns);
        float* const totals = room;
        float* const unpacked = room + job.rows * kTileColumns;
        const Scratch scratch(job, reinterpret_cast<char*>(room + run_floats(job.rows)));
        bool has_outliers = false;
        for (int64_t word = 0; word < job.words; ++word) has_outliers |= job.any_outlier[word] != 0;
        const int64_t last = end * kTileColumns < a.N ? end * kTileColumns : a.N;
        for (int64_t n = begin * kTileColumns; n < last; n += job.blocks.panel_rows()) {
            const int64_t left = last - n, rows = left < job.blocks.panel_rows() ? left : job.blocks.panel_rows();
            add_up(job, n, rows, scratch);
            for (int64_t i = 0; i < rows; i += kTileColumns) {
                const int64_t columns = rows - i < kTileColumns ? rows - i : kTileColumns;
                if (has_outliers) Base::add_outliers(job, n + i, columns, totals, unpacked);
                finish_columns(job, scratch, n + i, i, columns, totals);
            }
        }
    }
};

template <typename Isa>
constexpr Kernels8 tiled8_kernels() {
    return {Linear8<Isa>::split_row, Linear8<Isa>::mark_columns, Tiled8<Isa>::run, Tiled8<Isa>::interleave_rows};
}

}  // namespace

}  // namespace hb
