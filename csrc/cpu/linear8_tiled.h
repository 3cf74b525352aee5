// LLM.int8() on tiles, written once: linear8_amx.cpp compiles it for the processor, the C tests for tiles in plain C++.
// Rows of x are split, and outliers meet the weight, as linear8_kernel.h has it; only the exact product is another, of
// signed codes (tile_product.h). Its sums are exact, so every bit is that of the other levels.
//
// A panel of weight rows is copied a stretch at a time into the cache, padded with zeros, and meets all of x there; few
// rows of x meet whole tiles of the weight where it lies.
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
        alignas(64) char rows[kTileRows * kRowStride];
        for (int64_t r = 0; r < columns; ++r) {
            const int64_t row = block * columns + r;
            char* const to = rows + r * kRowStride;
            if (row < job.rows) {
                memcpy(to, job.codes + row * job.stride + piece * kStretchBytes, static_cast<size_t>(bytes));
            } else {
                memset(to, 0, static_cast<size_t>(bytes));
            }
        }
        interleave<Isa>(rows, columns, bytes, job.tiles + job.blocks.at(block, piece));
    }

    struct Scratch {
        char* panel;
        int32_t* sums;
        int64_t* exact;  // where rows are so long that int32 does not hold their sums, else null
        Scratch(const Job8& job, char* from)
            : panel(from),
              sums(reinterpret_cast<int32_t*>(from + job.blocks.panel_bytes())),
              exact(job.args->K > kExactTerms8 ? reinterpret_cast<int64_t*>(sums + job.blocks.sums()) : nullptr) {}
    };

    // What TileProduct asks for.
    struct Work {
        const Job8& job;
        const Scratch& scratch;
        float* const totals;
        float* const unpacked;
        const bool has_outliers;

        void fill(const Stretch& at, char* panel) {
            const int64_t k = at.piece * kStretchBytes, K = job.args->K;
            const int64_t count = K - k < kStretchBytes ? K - k : kStretchBytes;
            const int64_t whole = count / kTileRowBytes * kTileRowBytes;
            for (int64_t i = 0; i < at.rows; ++i, panel += kRowStride) {
                const int8_t* const codes = job.args->codes + (at.n + i) * K + k;
                for (int64_t c = 0; c < whole; c += kTileRowBytes) memcpy(panel + c, codes + c, kTileRowBytes);
                if (count > whole) memcpy(panel + whole, codes + whole, static_cast<size_t>(count - whole));
                memset(panel + count, 0, static_cast<size_t>(kStretchBytes - count));
            }
        }

        // Few rows of x meet each line of the weight once, so that copying it would not pay.
        const char* where(const Stretch& at) const {
            const int64_t K = job.args->K;
            if (!job.blocks.keeps_sums() || K % kTileRowBytes != 0 || at.rows % kTileRows != 0) return nullptr;
            return reinterpret_cast<const char*>(job.args->codes) + at.n * K + at.piece * kStretchBytes;
        }
        Fetching fetching(const Stretch& next, int64_t steps) const {
            const int64_t first = next.n * job.args->K + next.piece * kStretchBytes;
            const char* const codes = reinterpret_cast<const char*>(job.args->codes) + first;
            return {codes, next.rows, job.args->K, job.blocks.piece_bytes(next.piece), steps};
        }
        int64_t stride() const { return job.args->K; }

        bool is_new(int64_t piece) const { return piece % kExactPieces == 0; }
        bool is_wanted(int64_t piece) const {
            return piece + 1 >= job.blocks.pieces() || piece % kExactPieces == kExactPieces - 1;
        }

        void take(const Stretch& at, const char*) {
            if (scratch.exact != nullptr) add_exact(at);
            if (at.piece + 1 < job.blocks.pieces()) return;
            for (int64_t i = 0; i < at.rows; i += kTileColumns) {
                const int64_t columns = at.rows - i < kTileColumns ? at.rows - i : kTileColumns;
                if (has_outliers) Base::add_outliers(job, at.n + i, columns, totals, unpacked);
                finish_columns(job, scratch, at.n + i, i, columns, totals);
            }
        }

        void add_exact(const Stretch& at) {
            const int64_t tiles = (at.rows + kTileRows - 1) / kTileRows * job.blocks.blocks;
            const bool is_first = at.piece < kExactPieces;
            for (int64_t i = 0; i < tiles * kTileRows * job.blocks.columns; ++i) {
                scratch.exact[i] = (is_first ? 0 : scratch.exact[i]) + scratch.sums[i];
            }
        }
    };

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
            Isa::transpose16(reinterpret_cast<const char*>(scratch.sums + first), wide * kUnitBytes,
                             reinterpret_cast<char*>(sums), kTileRowBytes);
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
        Work work{job, scratch, totals, unpacked, has_outliers};
        TileProduct<Isa>::run(job.blocks, job.tiles, begin * kTileColumns, last, scratch.panel,
                              reinterpret_cast<char*>(scratch.sums), work);
    }
};

template <typename Isa>
constexpr Kernels8 tiled8_kernels() {
    return {Linear8<Isa>::split_row, Linear8<Isa>::mark_columns, Tiled8<Isa>::run, Tiled8<Isa>::interleave_rows};
}

}  // namespace

}  // namespace hb
