// LLM.int8(), written once for every instruction set: each linear8_<level>.cpp includes this file once, compiled for
// its level, and brings an Isa with the exact product of int8 codes and the search for outliers.
//
// Weight rows are read where they lie, four together against up to six rows of x; sums are int32, exact, and moved to
// int64 before they could overflow, so that their order does not matter. Where the processor multiplies unsigned by
// signed bytes, codes of x are kept plus Isa::kOffset, and kOffset times the sum of the weight row is taken off again.
//
// Outliers meet the weight in float32 in the order of their columns, products and sums rounded one by one as the
// reference has it. A column of the tile is unpacked once for all rows of x that have an outlier in it: in a language
// model these are the same few columns again and again.
//
// Everything is in an unnamed namespace, as in decoded_kernel.h and for the same reason.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "clones.h"
#include "fetch.h"
#include "floats.h"
#include "formats.h"
#include "int8.h"
#include "linear8.h"

namespace hb {

namespace {

HB_INLINE uint64_t outliers_one_by_one(const float* values, int64_t count, float threshold) {
    uint64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= uint64_t{fabsf(values[i]) >= threshold} << i;
    return found;
}

template <typename Isa>
struct Linear8 {
    using Sum = typename Isa::Sum;

    static constexpr int64_t kGroup = Isa::kGroup;  // codes multiplied by one instruction
    static constexpr int kRows = Isa::kRows;

    // --- rows of x ------------------------------------------------------------------------------------------------

    static int64_t columns_in(int64_t K, int64_t word) { return K - word * kWord < kWord ? K - word * kWord : kWord; }

    static void split_row(const Job8& job, int64_t slot, float* values) {
        const hb_linear8_args& a = *job.args;
        uint64_t* const outliers = job.outliers + slot * job.words;
        load_floats(a.x, a.x_dtype, (job.first_row + slot) * a.K, a.K, values);
        // Ordinary values in an outlier column still count for the row's maximum, as in bitsandbytes: out later.
        for (int64_t word = 0; word < job.words; ++word) {
            outliers[word] = Isa::outliers(values + word * kWord, columns_in(a.K, word), job.threshold);
            clear(values + word * kWord, outliers[word]);
        }
        job.row_absmax[slot] = largest_magnitude(values, a.K);
        for (int64_t word = 0; word < job.words && job.batch_outliers != nullptr; ++word) {
            outliers[word] |= job.batch_outliers[word];
            clear(values + word * kWord, outliers[word]);
        }
        job.counts[slot] = 0;
        for (int64_t word = 0; word < job.words; ++word) job.counts[slot] += __builtin_popcountll(outliers[word]);
        uint8_t* const codes = job.codes + slot * job.stride;
        round_to_int8(values, a.K, int8_factor(job.row_absmax[slot]), reinterpret_cast<int8_t*>(codes));
        for (int64_t k = 0; k < a.K; ++k) codes[k] = static_cast<uint8_t>(codes[k] + Isa::kOffset);
        memset(codes + a.K, 0, static_cast<size_t>(job.stride - a.K));
    }

    static void mark_columns(const Job8& job, int64_t begin, int64_t end, uint64_t* mask) {
        const hb_linear8_args& a = *job.args;
        float values[kWord];
        for (int64_t word = begin; word < end; ++word) {
            const int64_t columns = columns_in(a.K, word);
            mask[word] = 0;
            for (int64_t row = 0; row < a.M; ++row) {
                load_floats(a.x, a.x_dtype, row * a.K + word * kWord, columns, values);
                mask[word] |= Isa::outliers(values, columns, job.threshold);
            }
        }
    }

    // --- exact products -------------------------------------------------------------------------------------------

    template <int Rows>
    struct Sums {
        Sum at[Rows][kQuad];
    };

    // Multiplies `count` codes, whole groups: Rows rows of x, kQuad weight rows `w_stride` apart. The first rows of x
    // to meet a weight row also add up the weights alone and fetch what lies at `ahead`. A function of its own that
    // hands out its sums as they are: inlined, or adding their lanes itself, it kept them on the stack.
    template <int Rows, bool IsFirst>
    static HB_NOINLINE void multiply(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride,
                                     int64_t count, Sums<Rows>& out, Sums<1>& out_weights, const int8_t* ahead) {
        Sums<Rows> sums{};
        Sums<1> alone{};
        for (int64_t k = 0; k < count; k += kGroup) {
            typename Isa::Weights weights[kQuad];
            for (int n = 0; n < kQuad; ++n) weights[n] = Isa::load_weights(w + n * w_stride + k);
            if constexpr (IsFirst) {
                for (int64_t i = 0; i < kQuad * kGroup; i += 64, ahead += 64) fetch_line(ahead);
                if constexpr (Isa::kOffset != 0) {
                    for (int n = 0; n < kQuad; ++n) alone.at[0][n] = Isa::add(alone.at[0][n], weights[n]);
                }
            }
            for (int r = 0; r < Rows; ++r) {
                const typename Isa::Codes codes = Isa::load_codes(x + r * x_stride + k);
                for (int n = 0; n < kQuad; ++n) sums.at[r][n] = Isa::dot(sums.at[r][n], codes, weights[n]);
            }
        }
        out = sums;
        if constexpr (IsFirst) out_weights = alone;
    }

    static HB_INLINE void add_totals(const Sum* sums, int64_t* exact) {
        int32_t totals[kQuad];
        Isa::totals(sums, totals);
        for (int n = 0; n < kQuad; ++n) exact[n] += totals[n];
    }

    // The same, added up over the lanes and to exact[r * kTileColumns + n] and weight_sums[n].
    template <int Rows, bool IsFirst>
    static HB_INLINE void add_products(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride,
                                       int64_t count, int64_t* exact, int64_t* weight_sums, const int8_t* ahead) {
        Sums<Rows> sums;
        Sums<1> weights;
        multiply<Rows, IsFirst>(x, x_stride, w, w_stride, count, sums, weights, ahead);
        for (int r = 0; r < Rows; ++r) add_totals(sums.at[r], exact + r * kTileColumns);
        if constexpr (IsFirst && Isa::kOffset != 0) add_totals(weights.at[0], weight_sums);
    }

    // Columns [begin, end) of Rows rows of x and of `columns` (1 .. kQuad) weight rows, added as `multiply` has it.
    template <int Rows, bool IsFirst>
    static void quad(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t K, int64_t columns, int64_t begin,
                     int64_t end, int64_t* exact, int64_t* weight_sums) {
        const int64_t whole = columns == kQuad ? (end - begin) / kGroup * kGroup : 0;
        const int8_t* const ahead = w + fetch_distance(kQuad, K) + kQuad * begin;
        add_products<Rows, IsFirst>(x + begin, x_stride, w + begin, K, whole, exact, weight_sums, ahead);
        for (int64_t k = begin + whole; k < end; k += kGroup) {  // what is not a whole group of four rows: padded
            alignas(64) int8_t padded[kQuad][kGroup] = {};
            const int64_t count = end - k < kGroup ? end - k : kGroup;
            for (int64_t n = 0; n < columns; ++n) memcpy(padded[n], w + n * K + k, static_cast<size_t>(count));
            add_products<Rows, IsFirst>(x + k, x_stride, padded[0], kGroup, kGroup, exact, weight_sums, padded[0]);
        }
    }

    // --- one tile: rows of x [row, row + Rows) x weight rows [n, n + columns) ------------------------------------

    // Columns that are multiplied before the next ones. Few rows of x read the weight in the order of memory; for more
    // they are even shares that stay in the first cache, of the rows of x while all of a tile's weight rows meet them.
    static int64_t stretch_of(const Job8& job) {
        const int64_t K = job.args->K;
        if (job.rows <= 2 * kRows || K <= kStretch8) return kExactTerms8;
        const int64_t pieces = (K + kStretch8 - 1) / kStretch8, share = (K + pieces - 1) / pieces;
        return (share + kGroup - 1) / kGroup * kGroup;
    }

    // out[r * kTileColumns + i]; weight_sums[i] are added up for the first rows of x and used for all.
    template <int Rows, bool IsFirst>
    static void products(const Job8& job, int64_t row, int64_t n, int64_t columns, int64_t* weight_sums, float* out) {
        const hb_linear8_args& a = *job.args;
        const uint8_t* const x = job.codes + row * job.stride;
        int64_t exact[Rows * kTileColumns] = {};
        const int64_t stretch = stretch_of(job);
        for (int64_t k = 0; k < a.K; k += stretch) {
            const int64_t end = a.K - k < stretch ? a.K : k + stretch;
            for (int64_t at = 0; at < columns; at += kQuad) {
                const int64_t some = columns - at < kQuad ? columns - at : kQuad;
                const int8_t* const w = a.codes + (n + at) * a.K;
                quad<Rows, IsFirst>(x, job.stride, w, a.K, some, k, end, exact + at, weight_sums + at);
            }
        }
        for (int r = 0; r < Rows; ++r) {
            for (int64_t i = 0; i < columns; ++i) {
                const int64_t sum = exact[r * kTileColumns + i] - Isa::kOffset * weight_sums[i];
                const float product = static_cast<float>(sum) * job.row_absmax[row + r];
                out[r * kTileColumns + i] = product * a.absmax[n + i] * kInt8ProductScale;
            }
        }
    }

    template <int Rows = kRows>
    static void products_of(int64_t rows, const Job8& job, int64_t row, int64_t n, int64_t columns,
                            int64_t* weight_sums, float* out) {
        if constexpr (Rows > 1) {
            if (rows < Rows) return products_of<Rows - 1>(rows, job, row, n, columns, weight_sums, out);
        }
        if (row == 0) {
            products<Rows, true>(job, row, n, columns, weight_sums, out);
        } else {
            products<Rows, false>(job, row, n, columns, weight_sums, out);
        }
    }

    // unpacked[b]: column b of `word` of x, in the tile's weight rows, as float32; only columns with outliers.
    static void unpack(const Job8& job, int64_t word, int64_t n, int64_t columns, float* unpacked) {
        const hb_linear8_args& a = *job.args;
        for (uint64_t bits = job.any_outlier[word]; bits != 0; bits &= bits - 1) {
            const int64_t bit = __builtin_ctzll(bits);
            const int8_t* const column = a.codes + n * a.K + word * kWord + bit;
            float* const values = unpacked + bit * kTileColumns;
            for (int64_t i = 0; i < columns; ++i) values[i] = static_cast<float>(column[i * a.K]);
            for (int64_t i = columns; i < kTileColumns; ++i) values[i] = 0;
        }
    }

    // totals[row][i]: the outlier terms of every row and the tile's columns, in the order of the columns of x.
    static void add_outliers(const Job8& job, int64_t n, int64_t columns, float* totals, float* unpacked) {
        const hb_linear8_args& a = *job.args;
        memset(totals, 0, static_cast<size_t>(job.rows * kTileColumns) * sizeof(float));
        for (int64_t next = 0; next < job.words;) {
            int64_t words[kWords], found = 0;
            for (; next < job.words && found < kWords; ++next) {
                if (job.any_outlier[next] == 0) continue;
                unpack(job, next, n, columns, unpacked + found * kWord * kTileColumns);
                words[found++] = next;
            }
            for (int64_t row = 0; row < job.rows; ++row) {
                if (job.counts[row] == 0) continue;
                float total[kTileColumns];
                memcpy(total, totals + row * kTileColumns, sizeof total);
                for (int64_t w = 0; w < found; ++w) {
                    const int64_t first = (job.first_row + row) * a.K + words[w] * kWord;
                    for (uint64_t bits = job.outliers[row * job.words + words[w]]; bits != 0; bits &= bits - 1) {
                        const int64_t bit = __builtin_ctzll(bits);
                        const float value = load_float(a.x, a.x_dtype, first + bit);
                        const float* const weights = unpacked + (w * kWord + bit) * kTileColumns;
                        for (int64_t i = 0; i < kTileColumns; ++i) total[i] += value * weights[i];
                    }
                }
                memcpy(totals + row * kTileColumns, total, sizeof total);
            }
        }
    }

    static void run(const Job8& job, int64_t begin, int64_t end, float* scratch) {
        const hb_linear8_args& a = *job.args;
        float* const totals = scratch;
        float* const unpacked = scratch + job.rows * kTileColumns;
        float out[kRows * kTileColumns];
        bool has_outliers = false;
        for (int64_t word = 0; word < job.words; ++word) has_outliers |= job.any_outlier[word] != 0;
        for (int64_t n = begin * kTileColumns; n < a.N && n < end * kTileColumns; n += kTileColumns) {
            const int64_t columns = a.N - n < kTileColumns ? a.N - n : kTileColumns;
            int64_t weight_sums[kTileColumns] = {};
            for (int64_t row = 0, blocks = (job.rows + kRows - 1) / kRows; row < job.rows; --blocks) {
                const int64_t together = (job.rows - row + blocks - 1) / blocks;
                products_of(together, job, row, n, columns, weight_sums, out);
                // The weights of the tile are in the cache now, also for their outlier columns.
                if (has_outliers && row == 0) add_outliers(job, n, columns, totals, unpacked);
                for (int64_t r = 0; r < together; ++r) {
                    finish(job, row + r, n, columns, totals + (row + r) * kTileColumns, out + r * kTileColumns);
                }
                row += together;
            }
        }
    }

  protected:
    static void clear(float* values, uint64_t which) {
        for (; which != 0; which &= which - 1) values[__builtin_ctzll(which)] = 0;
    }

    // Outlier terms and bias on top, then one rounding.
    static void finish(const Job8& job, int64_t row, int64_t n, int64_t columns, const float* total, float* out) {
        const hb_linear8_args& a = *job.args;
        const bool has_outliers = job.counts[row] != 0;
        for (int64_t i = 0; i < columns && has_outliers; ++i) out[i] += total[i] * (a.absmax[n + i] / kInt8Max);
        for (int64_t i = 0; i < columns && a.bias != nullptr; ++i) out[i] += load_float(a.bias, a.bias_dtype, n + i);
        store_floats(out, columns, a.out, a.x_dtype, (job.first_row + row) * a.N + n);
    }
};

template <typename Isa>
constexpr Kernels8 linear8_kernels() {
    return {Linear8<Isa>::split_row, Linear8<Isa>::mark_columns, Linear8<Isa>::run, nullptr};
}

}  // namespace

}  // namespace hb
