// Float activations times decoded weights, written once for every instruction set: each decoded_<level>.cpp includes
// this file once, compiled for its level, and brings an Isa for 4-bit and one for int8 codes: the vector type and a
// dozen operations on it.
//
// Everything is a dot product of a row of x with a row of the weight, both in the order in which codes are decoded. A
// byte holds two 4-bit codes, so a group of 2 V codes gives the V values of its high nibbles and the V of its low ones:
//
//     codes      c0 c1 c2 c3 ...      group decoded   [ c0 c2 c4 ... | c1 c3 c5 ... ]     x is kept the same way
//
// Values of 4-bit codes are dtype(table[code] * absmax), the checkpoint's own contract: not the values are scaled but,
// once a block, the sixteen entries of the table. An int8 code is its own value, exact in every dtype, in its natural
// order; a row's sum is scaled by absmax / 127 at the end.
//
// Few rows of x: decoded vectors go from register to register (`few`), four weight rows at a time, or two where x has
// more than Isa::kRowsByFour rows (`few_in_pairs`); up to Isa::kRowsWithoutTile rows the codes are rather decoded twice
// than written down. Many: a tile of weight rows is decoded into the cache and meets all of x, up to six by four sums
// at a time (`many`). The sum of one row and one column is added up in the same order both ways: over the groups in
// each lane, then over the lanes in one fixed tree.
//
// Where scaling the table costs as much as the products of a block with one row (Isa::kScalesSums), up to kRowsBySums
// rows take a third way: the table stays as it is, and what a block has added up to is scaled. Not in invariant calls,
// where a row must not tell how many others there are.
//
// Everything is in an unnamed namespace and calls nothing inline from shared headers but HB_INLINE functions: the
// linker must not choose code compiled for one level for another.
#pragma once

#include <stdint.h>
#include <string.h>

#include "clones.h"
#include "decode4.h"
#include "decoded.h"
#include "fetch.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

namespace {

template <typename Isa>
struct Decoded {
    using Value = typename Isa::Value;
    using Vector = typename Isa::Vector;
    using Sum = typename Isa::Sum;
    using Table = typename Isa::Table;

    static constexpr int64_t kGroup = Isa::kGroup;
    static constexpr int64_t kHalf = kGroup / 2;             // values in a vector
    static constexpr int64_t kCodes = Isa::kIsInt8 ? 1 : 2;  // in a byte
    static constexpr int kFewRows = Isa::kFewRows;           // rows of x that meet weights from registers, at most
    static constexpr int kRows = Isa::kRows;  // rows of x that meet kWeightRows weight rows in registers, at most
    // Values of a row that are worked on before the next rows: x and the tile then stay in the first cache.
    static constexpr int64_t kStretch = 2560 / static_cast<int64_t>(sizeof(Value));
    // Bytes of weight rows in pairs that are worked on before the next bytes: x then stays in the first cache. Of int8
    // it is the whole row, its block.
    static constexpr size_t kPairStretch = 1024;
    static_assert(kFewRows <= kMostRowsTogether && kRows <= kMostRowsTogether, "room for their sums");
    static constexpr int kRowsBySums = 3;  // from four on, scaling their sums costs more than scaling the tables

    static HB_INLINE Table table_of(int64_t format) {
        return Isa::table(format == HB_NF4 ? kNf4Values.at : kFp4Values.at);
    }

    // A whole group in decoded order.
    static HB_INLINE void regroup(const float* values, Value* out) {
        for (int64_t i = 0; i < kHalf; ++i) {
            out[i] = Isa::value(values[Isa::kIsInt8 ? i : 2 * i]);
            out[kHalf + i] = Isa::value(values[Isa::kIsInt8 ? kHalf + i : 2 * i + 1]);
        }
    }

    // `count` values -> whole groups in decoded order, the rest zero.
    static void regroup(const float* values, int64_t count, int64_t padded, Value* out) {
        int64_t k = 0;
        for (; k + kGroup <= count; k += kGroup) regroup(values + k, out + k);
        for (; k < padded; k += kGroup) {
            float some[kGroup] = {};
            if (k < count) memcpy(some, values + k, static_cast<size_t>(count - k) * sizeof(float));
            regroup(some, out + k);
        }
    }

    static void load_x(const DecodedCall& a, int64_t row, int64_t padded_k, void* out) {
        float piece[kGroup * 8];
        Value* to = static_cast<Value*>(out);
        for (int64_t k = 0; k < padded_k; k += kGroup * 8) {
            const int64_t padded = padded_k - k < kGroup * 8 ? padded_k - k : kGroup * 8;
            const int64_t left = a.K - k, count = left < padded ? (left < 0 ? 0 : left) : padded;
            load_floats(a.x, a.x_dtype, row * a.K + k, count, piece);
            regroup(piece, count, padded, to + k);
        }
    }

    // --- sums of one micro-tile: Rows rows of x, kWeightRows weight rows ------------------------------------------

    template <int Rows>
    struct Sums {
        Sum at[Rows][kWeightRows];

        HB_INLINE void clear() {
            for (int r = 0; r < Rows; ++r) {
                for (int n = 0; n < kWeightRows; ++n) at[r][n] = Isa::zero();
            }
        }
        // Each column's sums of a block times the column's absmax.
        HB_INLINE void add_scaled(const Sums& block, const float* absmax, size_t stride) {
            for (size_t n = 0; n < kWeightRows; ++n) {
                for (int r = 0; r < Rows; ++r) at[r][n] = Isa::add_scaled(at[r][n], block.at[r][n], absmax[n * stride]);
            }
        }
        // out[r * stride + n]
        HB_INLINE void add_lanes(float* out, int64_t stride) const {
            for (int r = 0; r < Rows; ++r) Isa::add_lanes(at[r], out + r * stride);
        }
    };

    // --- few rows of x --------------------------------------------------------------------------------------------

    // Weight rows n .. n + 3, each beginning with a block, against Rows rows of x. absmax: float32 [4, blocks]. A
    // function of its own: inlined beside its neighbours, one row took half as long again.
    template <int Rows, bool BySums>
    static HB_NOINLINE void few(const DecodedJob& job, int64_t n, const float* absmax, float* out, int64_t stride) {
        const DecodedCall& a = *job.call;
        const float lift = lift_of(a.weight.format);
        const Table base = table_of(a.weight.format), lifted = Isa::scaled(base, lift);
        const size_t row_bytes = static_cast<size_t>(a.K / kCodes);
        const size_t block_bytes = static_cast<size_t>(a.weight.blocksize / kCodes);
        const uint8_t* const packed = a.weight.codes + static_cast<size_t>(n) * row_bytes;
        const Value* const x = static_cast<const Value*>(job.x);
        const uint8_t* fetched = packed + fetch_distance(kWeightRows, static_cast<int64_t>(row_bytes));
        Sums<Rows> sums, block;
        sums.clear();
        const size_t blocks = row_bytes / block_bytes;
        for (size_t at = 0; at < row_bytes; ++absmax) {
            Table tables[kWeightRows];
            for (size_t i = 0; i < kWeightRows; ++i) {
                tables[i] = BySums ? lifted : Isa::scaled(base, absmax[i * blocks]);
            }
            if constexpr (BySums) {
                block.clear();
            } else {
                block = sums;
            }
            const size_t end = at + block_bytes;
            for (; at < end; at += kGroup / kCodes) {
                for (int64_t i = 0; i < kGroup / kCodes * kWeightRows; i += 64, fetched += 64) fetch_line(fetched);
                for (int i = 0; i < kWeightRows; ++i) {
                    Vector high, low;
                    Isa::decode(packed + static_cast<size_t>(i) * row_bytes + at, tables[i], high, low);
                    for (int r = 0; r < Rows; ++r) {
                        const Value* const some = x + r * job.stride + kCodes * at;
                        block.at[r][i] = Isa::dot(block.at[r][i], Isa::load(some), high);
                        block.at[r][i] = Isa::dot(block.at[r][i], Isa::load(some + kHalf), low);
                    }
                }
            }
            if constexpr (BySums) {
                sums.add_scaled(block, absmax, blocks);
            } else {
                sums = block;
            }
        }
        sums.add_lanes(out, stride);
        for (int r = 0; r < Rows && BySums; ++r) {
            for (int64_t i = 0; i < kWeightRows; ++i) out[r * stride + i] /= lift;
        }
    }

    // A group of two weight rows, decoded.
    struct Pair {
        Vector high[2], low[2];

        HB_INLINE Pair(const uint8_t* packed, size_t row_bytes, const Table& first, const Table& second) {
            Isa::decode(packed, first, high[0], low[0]);
            Isa::decode(packed + row_bytes, second, high[1], low[1]);
        }
    };

    // Bytes [begin, end) of two weight rows, from `packed` on, whole blocks of them, against as much of Rows rows of x.
    // A group is decoded before the products with the one before it, since the processor does not look that far ahead.
    template <int Rows>
    static HB_INLINE void pair_stretch(const DecodedJob& job, const uint8_t* packed, size_t begin, size_t end,
                                       const float* scales, const uint8_t* fetched, Sum (&kept)[Rows][2]) {
        const DecodedCall& a = *job.call;
        const Table base = table_of(a.weight.format);
        const size_t row_bytes = static_cast<size_t>(a.K / kCodes);
        const size_t block_bytes = static_cast<size_t>(a.weight.blocksize / kCodes);
        const size_t blocks = row_bytes / block_bytes;
        const Value* x = static_cast<const Value*>(job.x) + begin * kCodes;
        scales += begin / block_bytes;
        Sum sums[Rows][2];
        for (int r = 0; r < Rows; ++r) sums[r][0] = kept[r][0], sums[r][1] = kept[r][1];
        Table first = Isa::scaled(base, scales[0]), second = Isa::scaled(base, scales[blocks]);
        Pair weights(packed + begin, row_bytes, first, second);
        for (size_t at = begin, block_end = begin + block_bytes; at < end; x += kGroup) {
            for (int64_t i = 0; i < kGroup / kCodes * 2; i += 64, fetched += 64) __builtin_prefetch(fetched, 0, 2);
            at += kGroup / kCodes;
            const size_t next = at < end ? at : begin;  // behind the last group anything will do
            if (next == block_end) {
                block_end += block_bytes, ++scales;
                first = Isa::scaled(base, scales[0]), second = Isa::scaled(base, scales[blocks]);
            }
            const Pair following(packed + next, row_bytes, first, second);
            for (int r = 0; r < Rows; ++r) {
                const Vector even = Isa::load(x + r * job.stride);
                for (int i = 0; i < 2; ++i) sums[r][i] = Isa::dot(sums[r][i], even, weights.high[i]);
            }
            for (int r = 0; r < Rows; ++r) {
                const Vector odd = Isa::load(x + r * job.stride + kHalf);
                for (int i = 0; i < 2; ++i) sums[r][i] = Isa::dot(sums[r][i], odd, weights.low[i]);
            }
            weights = following;
        }
        for (int r = 0; r < Rows; ++r) kept[r][0] = sums[r][0], kept[r][1] = sums[r][1];
    }

    // As `few` for `columns` weight rows, two at a time, where x has too many rows for four. Fetches as many that
    // follow.
    template <int Rows>
    static HB_NOINLINE void few_in_pairs(const DecodedJob& job, int64_t n, int64_t columns, const float* absmax,
                                         float* out) {
        const DecodedCall& a = *job.call;
        const size_t row_bytes = static_cast<size_t>(a.K / kCodes), pairs = static_cast<size_t>(columns / 2);
        const size_t block_bytes = static_cast<size_t>(a.weight.blocksize / kCodes);
        const size_t blocks = row_bytes / block_bytes;
        const size_t stretch_bytes = block_bytes < kPairStretch ? kPairStretch : block_bytes;
        const uint8_t* const packed = a.weight.codes + static_cast<size_t>(n) * row_bytes;
        const uint8_t* fetched = packed + static_cast<size_t>(columns) * row_bytes;
        Sum sums[kMostTileRows / 2][Rows][2];
        for (auto& pair : sums) {
            for (auto& row : pair) row[0] = row[1] = Isa::zero();
        }
        for (size_t begin = 0; begin < row_bytes; begin += stretch_bytes) {
            const size_t end = begin + stretch_bytes < row_bytes ? begin + stretch_bytes : row_bytes;
            for (size_t pair = 0; pair < pairs; ++pair, fetched += 2 * (end - begin)) {
                pair_stretch<Rows>(job, packed + 2 * pair * row_bytes, begin, end, absmax + 2 * pair * blocks, fetched,
                                   sums[pair]);
            }
        }
        for (int64_t quad = 0; quad < columns / kWeightRows; ++quad) {
            Sums<Rows> four;
            for (int r = 0; r < Rows; ++r) {
                for (int i = 0; i < kWeightRows; ++i) four.at[r][i] = sums[2 * quad + i / 2][r][i % 2];
            }
            four.add_lanes(out + quad * kWeightRows, kMostTileRows);
        }
    }

    // --- many rows of x -------------------------------------------------------------------------------------------

    // Values [begin, end) of Rows rows of x and of the tile, added to sums that are kept from one stretch to the next.
    template <int Rows>
    static HB_NOINLINE void stretch(const Value* x, const Value* tile, int64_t stride, int64_t count,
                                    Sums<Rows>& kept) {
        Sums<Rows> sums = kept;
        for (int64_t k = 0; k < count; k += kHalf) {
            Vector weights[kWeightRows];
            for (int n = 0; n < kWeightRows; ++n) weights[n] = Isa::load(tile + n * stride + k);
            for (int r = 0; r < Rows; ++r) {
                const Vector values = Isa::load(x + r * stride + k);
                for (int n = 0; n < kWeightRows; ++n) sums.at[r][n] = Isa::dot(sums.at[r][n], values, weights[n]);
            }
        }
        kept = sums;
    }

    // Rows rows of x against the whole tile -> out[r * kMostTileRows + n].
    template <int Rows>
    static void many(const DecodedJob& job, const Value* x, const Value* tile, int64_t tile_rows, float* out) {
        Sums<Rows> sums[kMostTileRows / kWeightRows];
        const int64_t quads = (tile_rows + kWeightRows - 1) / kWeightRows;
        for (int64_t quad = 0; quad < quads; ++quad) sums[quad].clear();
        for (int64_t k = 0; k < job.padded_k; k += kStretch) {
            const int64_t count = job.padded_k - k < kStretch ? job.padded_k - k : kStretch;
            for (int64_t quad = 0; quad < quads; ++quad) {
                stretch<Rows>(x + k, tile + quad * kWeightRows * job.stride + k, job.stride, count, sums[quad]);
            }
        }
        for (int64_t quad = 0; quad < quads; ++quad) sums[quad].add_lanes(out + quad * kWeightRows, kMostTileRows);
    }

    // --- decoding into a tile -------------------------------------------------------------------------------------

    // Weight row n, which begins with a block, one vector after another.
    static void decode_aligned(const DecodedCall& a, int64_t n, const float* absmax, Value* out) {
        const Table base = table_of(a.weight.format);
        const uint8_t* packed = a.weight.codes + n * (a.K / kCodes);
        for (int64_t k = 0; k < a.K; ++absmax) {
            const Table table = Isa::scaled(base, *absmax);
            for (const int64_t end = k + a.weight.blocksize; k < end; k += kGroup) {
                Vector high, low;
                Isa::decode(packed + k / kCodes, table, high, low);
                Isa::store(out + k, high);
                Isa::store(out + k + kHalf, low);
            }
        }
    }

    // Weight row n, wherever it begins and its blocks end, by way of float32 values in the natural order.
    static void decode_anyhow(const DecodedJob& job, int64_t n, const float* absmax, float* values, Value* out) {
        const DecodedCall& a = *job.call;
        if constexpr (Isa::kIsInt8) {
            const int8_t* const codes = reinterpret_cast<const int8_t*>(a.weight.codes) + n * a.K;
            for (int64_t k = 0; k < a.K; ++k) values[k] = static_cast<float>(codes[k]);
        } else {
            decode4(pair_table(a.weight.format), a.weight.codes, absmax, a.weight.blocksize, n * a.K, a.K, values);
        }
        regroup(values, a.K, job.padded_k, out);
    }

    static HB_INLINE bool is_aligned(const DecodedCall& a) {
        return a.K > 0 && a.K % a.weight.blocksize == 0 && a.weight.blocksize % kGroup == 0;
    }

    static void load_row_absmax(const DecodedCall& a, int64_t n, float* out) {
        const int64_t first = n * a.K / a.weight.blocksize, last = ((n + 1) * a.K - 1) / a.weight.blocksize;
        load_absmax(a.weight.absmax, first, last - first + 1, out);
    }

    // --- the whole: weight rows [begin, end) x kWeightRows --------------------------------------------------------

    static void run(const DecodedJob& job, int64_t begin, int64_t end, char* scratch) {
        const DecodedCall& a = *job.call;
        const DecodedScratch parts = scratch_of(job, sizeof(Value));
        Value* const tile = reinterpret_cast<Value*>(scratch);
        float* const absmax = reinterpret_cast<float*>(scratch + parts.tile_bytes);
        float* const row_values = reinterpret_cast<float*>(scratch + parts.tile_bytes + parts.absmax_bytes);
        float* const sums = reinterpret_cast<float*>(scratch + parts.tile_bytes + parts.absmax_bytes + parts.row_bytes);
        const int64_t last = end * kWeightRows < a.N ? end * kWeightRows : a.N;
        int64_t n = begin * kWeightRows;
        if (job.rows <= Isa::kRowsWithoutTile && is_aligned(a)) {
            while (n + kWeightRows <= last) {
                const int64_t left = (last - n) / kWeightRows * kWeightRows;
                const int64_t columns = left < kMostTileRows ? left : kMostTileRows;
                const int64_t blocks_of_row = a.K / a.weight.blocksize;
                const float* scales = absmax_at(a.weight.absmax, n * blocks_of_row, columns * blocks_of_row, absmax);
                fetch_absmax(a.weight.absmax, (n + columns) * blocks_of_row, columns * blocks_of_row);
                for (int64_t row = 0, blocks = (job.rows + kFewRows - 1) / kFewRows; row < job.rows; --blocks) {
                    DecodedJob some = job;
                    some.rows = (job.rows - row + blocks - 1) / blocks;
                    some.x = static_cast<const Value*>(job.x) + row * job.stride;
                    few_rows(some, n, columns, scales, sums);
                    finish(job, row, some.rows, n, columns, sums);
                    row += some.rows;
                }
                n += columns;
            }
        }
        while (n < last) {
            const int64_t columns = last - n < job.tile_rows ? last - n : job.tile_rows;
            fill_tile(job, n, columns, absmax, row_values, tile);
            const uint8_t* next = a.weight.codes + (n + columns) * a.K / kCodes;
            for (int64_t row = 0, blocks = (job.rows + kRows - 1) / kRows; row < job.rows; --blocks) {
                const int64_t together = (job.rows - row + blocks - 1) / blocks;  // evenly: 4 and 4 beat 6 and 2
                next = fetch_share(next, columns * a.K / kCodes / ((job.rows + kRows - 1) / kRows));
                many_rows(together, job, row, tile, columns, sums);
                finish(job, row, together, n, columns, sums);
                row += together;
            }
            n += columns;
        }
    }

  private:
    static void fill_tile(const DecodedJob& job, int64_t n, int64_t columns, float* absmax, float* row_values,
                          Value* tile) {
        const DecodedCall& a = *job.call;
        const int64_t padded = (columns + kWeightRows - 1) / kWeightRows * kWeightRows;
        for (int64_t i = 0; i < padded; ++i) {
            Value* const out = tile + i * job.stride;
            if (i >= columns || a.K == 0) {
                memset(static_cast<void*>(out), 0, static_cast<size_t>(job.padded_k) * sizeof(Value));
                continue;
            }
            load_row_absmax(a, n + i, absmax);
            if (is_aligned(a)) {
                decode_aligned(a, n + i, absmax, out);
            } else {
                decode_anyhow(job, n + i, absmax, row_values, out);
            }
        }
    }

    template <int Rows = kFewRows>
    static void few_rows(const DecodedJob& job, int64_t n, int64_t columns, const float* absmax, float* sums) {
        if constexpr (Rows > 1) {
            if (job.rows < Rows) return few_rows<Rows - 1>(job, n, columns, absmax, sums);
        }
        if constexpr (Rows > Isa::kRowsByFour) {
            few_in_pairs<Rows>(job, n, columns, absmax, sums);
        } else {
            const int64_t blocks = job.call->K / job.call->weight.blocksize;
            for (int64_t i = 0; i < columns; i += kWeightRows, absmax += kWeightRows * blocks) {
                if constexpr (Isa::kScalesSums && Rows <= kRowsBySums) {
                    if (!job.call->batch_invariant) {
                        few<Rows, true>(job, n + i, absmax, sums + i, kMostTileRows);
                        continue;
                    }
                }
                few<Rows, false>(job, n + i, absmax, sums + i, kMostTileRows);
            }
        }
    }

    template <int Rows = kRows>
    static void many_rows(int64_t rows, const DecodedJob& job, int64_t row, const Value* tile, int64_t columns,
                          float* sums) {
        if constexpr (Rows > 1) {
            if (rows < Rows) return many_rows<Rows - 1>(rows, job, row, tile, columns, sums);
        }
        many<Rows>(job, static_cast<const Value*>(job.x) + row * job.stride, tile, columns, sums);
    }

    // Bias and rounding: sums[r * kMostTileRows + i] -> out[first_row + row + r][n + i].
    static void finish(const DecodedJob& job, int64_t row, int64_t rows, int64_t n, int64_t columns, float* sums) {
        const DecodedCall& a = *job.call;
        for (int64_t r = 0; r < rows; ++r) {
            float* const own = sums + r * kMostTileRows;
            if constexpr (Isa::kIsInt8) {
                const float* const absmax = static_cast<const float*>(a.weight.absmax.absmax) + n;
                for (int64_t i = 0; i < columns; ++i) own[i] *= absmax[i] / kInt8Max;
            }
            if (a.bias != nullptr) {
                for (int64_t i = 0; i < columns; ++i) own[i] += load_float(a.bias, a.bias_dtype, n + i);
            }
            store_floats(own, columns, a.out, a.x_dtype, (job.first_row + row + r) * a.out_stride + n);
        }
    }
};

template <typename Isa>
constexpr DecodedKernels decoded_kernels() {
    return {Isa::kGroup, sizeof(typename Isa::Value), Decoded<Isa>::load_x, Decoded<Isa>::run};
}

}  // namespace

}  // namespace hb
