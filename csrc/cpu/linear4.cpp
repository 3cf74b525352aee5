// out = x * W^T + bias with W in 4 bits.
//
// The weight is never built: four of its rows at a time are decoded into the workspace, and every row of x meets them.
//
//     x, float32, padded        weight rows n .. n+3, decoded       sums of one x row
//     [rows_per_pass, Kp]   x   [4, Kp] per thread              ->  [4]
//
// For up to kFusedRows rows of x on a CPU with AVX-512, the decoded values go from one register to the next and
// never to memory (linear4_avx512.cpp): the same products, added in the same order.
//
// Kp is K rounded up to a whole number of lanes, the padding is zero. One sum runs over 16 lanes, lane l adding the
// products at k = l, l+16, ... in order, and the lanes are added in one fixed order. Neither M, nor the place of a row,
// nor the number of threads enters, so a row's result is the same in every batch.
#include "linear4.h"

#include "checks.h"
#include "clones.h"
#include "decode4.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {

namespace {

constexpr int64_t kFusedRows = 8;      // of x, up to which decoding anew for each four is faster than a tile
constexpr int64_t kRowsPerPass = 256;  // rows of x kept as float32 at a time

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

// The parts of the workspace, in floats; every part is a multiple of 64 bytes.
struct Layout {
    int64_t padded_k;
    int64_t x_floats;
    int64_t tile_floats;    // decoded weight rows of one thread
    int64_t absmax_floats;  // absmax of kWeightRows weight rows, one thread
    int64_t threads;

    explicit Layout(const hb_linear4_args& a)
        : padded_k(round_up(a.K, kLanes)),
          x_floats((a.M < kRowsPerPass ? a.M : kRowsPerPass) * padded_k),
          tile_floats(kWeightRows * padded_k),
          absmax_floats(kWeightRows * round_up(a.K / a.blocksize + 2, kLanes)),
          threads(threads_for(a.call.threads, a.N * (a.K / 8 + 1) * (a.M < 8 ? a.M : 8))) {}

    int64_t bytes() const { return (x_floats + threads * (tile_floats + absmax_floats)) * (int64_t)sizeof(float); }
};

HB_INLINE float add(const Lanes& lanes) {
    float sums[kLanes];
    memcpy(sums, &lanes, sizeof sums);
    return add_lanes(sums);
}

template <int Rows>
HB_INLINE void multiply_rows(const float* x, const float* tile, int64_t padded_k, float (*sums)[kWeightRows]) {
    Lanes totals[Rows][kWeightRows] = {};
    for (int64_t k = 0; k < padded_k; k += kLanes) {
        for (int64_t n = 0; n < kWeightRows; ++n) {
            const Lanes weights = *reinterpret_cast<const Lanes*>(tile + n * padded_k + k);
            for (int row = 0; row < Rows; ++row) {
                totals[row][n] += *reinterpret_cast<const Lanes*>(x + row * padded_k + k) * weights;
            }
        }
    }
    for (int row = 0; row < Rows; ++row) {
        for (int64_t n = 0; n < kWeightRows; ++n) sums[row][n] = add(totals[row][n]);
    }
}

// 1 to kActivationRows rows of x against one tile.
HB_CLONES void multiply(int64_t rows, const float* x, const float* tile, int64_t padded_k, float (*sums)[kWeightRows]) {
    switch (rows) {
        case 1:
            return multiply_rows<1>(x, tile, padded_k, sums);
        case 2:
            return multiply_rows<2>(x, tile, padded_k, sums);
        case 3:
            return multiply_rows<3>(x, tile, padded_k, sums);
        default:
            return multiply_rows<4>(x, tile, padded_k, sums);
    }
}

// `count` rows of the weight from row n on, each padded with zeros; rows beyond the last are zero.
void decode_tile(const hb_linear4_args& a, const Layout& layout, int64_t n, float* tile, float* absmax) {
    const AbsmaxSource source = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    for (int64_t row = 0; row < kWeightRows; ++row) {
        float* const values = tile + row * layout.padded_k;
        int64_t filled = 0;
        if (n + row < a.N && a.K > 0) {
            const int64_t first = (n + row) * a.K;
            const int64_t first_block = first / a.blocksize;
            load_absmax(source, first_block, (first + a.K - 1) / a.blocksize - first_block + 1, absmax);
            decode4(pair_table(a.format), a.packed, absmax, a.blocksize, first, a.K, values);
            filled = a.K;
        }
        memset(values + filled, 0, static_cast<size_t>(layout.padded_k - filled) * sizeof(float));
    }
}

// Rows n .. n + 3 of the weight as the AVX-512 kernel takes them: aligned to its lanes, their absmax loaded.
FusedRows fused_rows(const hb_linear4_args& a, const Layout& layout, int64_t n, float* absmax) {
    const AbsmaxSource source = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    const int64_t stride = layout.absmax_floats / kWeightRows;
    FusedRows rows = {&pair_table(a.format), a.K, a.blocksize, {}, {}, {}};
    for (int64_t row = 0; row < kWeightRows; ++row) {
        const int64_t first = (n + row) * a.K;
        const int64_t first_block = first / a.blocksize;
        load_absmax(source, first_block, (first + a.K - 1) / a.blocksize - first_block + 1, absmax + row * stride);
        rows.packed[row] = a.packed + first / 2;
        rows.absmax[row] = absmax + row * stride;
        rows.left[row] = (first_block + 1) * a.blocksize - first;
    }
    return rows;
}

// Rows [begin, end) of the weight, in groups of kWeightRows, against the `rows` rows of x kept in the workspace.
void run_groups(const hb_linear4_args& a, const Layout& layout, const float* x, int64_t first_row, int64_t rows,
                float* scratch, int64_t begin, int64_t end) {
    float* const tile = scratch;
    float* const absmax = scratch + layout.tile_floats;
    const bool fused = rows <= kFusedRows && can_fuse(a.K, a.blocksize);
    for (int64_t group = begin; group < end; ++group) {
        const int64_t n = group * kWeightRows;
        const int64_t columns = a.N - n < kWeightRows ? a.N - n : kWeightRows;
        float bias[kWeightRows] = {};
        for (int64_t i = 0; i < columns && a.bias != nullptr; ++i) bias[i] = load_float(a.bias, a.bias_dtype, n + i);
        const bool in_registers = fused && columns == kWeightRows;
        const FusedRows weight = in_registers ? fused_rows(a, layout, n, absmax) : FusedRows{};
        if (!in_registers) decode_tile(a, layout, n, tile, absmax);
        for (int64_t row = 0; row < rows; row += kActivationRows) {
            const int64_t together = rows - row < kActivationRows ? rows - row : kActivationRows;
            float sums[kActivationRows][kWeightRows];
            const float* const some = x + row * layout.padded_k;
            if (in_registers) {
                multiply_fused(together, some, layout.padded_k, weight, sums);
            } else {
                multiply(together, some, tile, layout.padded_k, sums);
            }
            for (int64_t r = 0; r < together; ++r) {
                for (int64_t i = 0; i < columns; ++i) sums[r][i] += bias[i];
                store_floats(sums[r], columns, a.out, a.x_dtype, (first_row + row + r) * a.N + n);
            }
        }
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = Layout(*args).bytes();
    return HB_OK;
}

extern "C" hb_status hb_linear4(const hb_linear4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const Layout layout(a);
    HB_REQUIRE(check_workspace(a.call, layout.bytes()));

    float* const x = static_cast<float*>(a.call.workspace);
    float* const scratch = x + layout.x_floats;
    for (int64_t first_row = 0; first_row < a.M; first_row += kRowsPerPass) {
        const int64_t rows = a.M - first_row < kRowsPerPass ? a.M - first_row : kRowsPerPass;
        for (int64_t row = 0; row < rows; ++row) {
            float* const padded = x + row * layout.padded_k;
            load_floats(a.x, a.x_dtype, (first_row + row) * a.K, a.K, padded);
            memset(padded + a.K, 0, static_cast<size_t>(layout.padded_k - a.K) * sizeof(float));
        }
        parallel_for(layout.threads, ceil_div(a.N, kWeightRows), [&](int64_t part, int64_t begin, int64_t end) {
            float* const mine = scratch + part * (layout.tile_floats + layout.absmax_floats);
            run_groups(a, layout, x, first_row, rows, mine, begin, end);
        });
    }
    return HB_OK;
}
