// The 4-bit matmul with int8 activations for AVX-512 with VNNI and more than a few rows of x: a lane to a weight row.
// linear4_int8_avx512.cpp says how codes lie, and decides.
//
// Sixteen weight rows are transposed in units of four bytes, so that a lane has eight codes of its row; two lookups
// make two vectors of bytes of them, the even and the odd ones. So no sum must be added up over its lanes, and a panel
// of 32 weight rows serves eight rows of x from registers:
//
//     panel            [group][unit][even, odd][32 weight rows] four bytes each
//     x                four codes of a row, loaded into every lane
//     sums             [8 rows of x][32 weight rows] of a group, int32, in registers
//     totals           [rows of x][32 weight rows] float32: sums times absmax and scale, added up group by group
//
// What a group costs at its end is four operations a sum for its sixteen products.
#include <immintrin.h>
#include <string.h>

#include "avx512.h"
#include "linear4_int8_wide.h"

namespace hb {

namespace {

constexpr int kVectors = 2;   // of sums, for a row of x
constexpr int kMostRows = 8;  // of x in registers; with twelve GCC 12 spills sums
constexpr int64_t kUnitBytes = 4;
constexpr int64_t kUnits = kGroupValues / 2 / kUnitBytes;  // of a group
constexpr int64_t kStepBytes = kVectors * 64;              // of a panel: what four codes of x meet
static_assert(kInt8Columns == kVectors * kLanes, "a row's sums");
static_assert(kPanelGroups % 2 == 0 && kPairBytes == kTransposedBytes, "pairs of groups");

// `bytes` bytes of codes of sixteen rows -> their vectors of a panel. Of `rows` rows the last one stands in for those
// that are not there. Fetches those of the next panel's rows.
HB_INLINE void fill(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t bytes, __m512i table,
                    uint8_t* panel) {
    alignas(64) char units[kLanes * kPairBytes];
    for (int64_t at = 0; at < bytes; at += kPairBytes) {
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(codes + (i + kInt8Columns) * row_bytes + at, 0, 2);
        const int64_t some = smaller(bytes - at, kPairBytes);
        transpose_codes(codes + at, row_bytes, rows, some, units);
        for (int64_t i = 0; i < some / kUnitBytes; ++i, panel += 2 * kStepBytes) {
            __m512i high, low;
            decode(_mm512_load_si512(units + i * kPairBytes), table, high, low);
            _mm512_store_si512(panel, high);
            _mm512_store_si512(panel + kStepBytes, low);
        }
    }
}

// What rows of x meet. absmax: [blocks][kInt8Columns] from the block of the first group on.
struct Panel {
    const uint8_t* bytes;
    int64_t groups;
    const float* absmax;
    int64_t in_block;   // groups of the first block that lie before the panel
    int64_t per_block;  // groups of a block
};

// Rows of x from the panel's first group on; their sums.
struct XRows {
    const int8_t* codes;
    const float* scales;
    const int32_t* offsets;
    int64_t stride;  // of codes
    int64_t groups;  // of a row: the stride of scales and offsets
    float* totals;

    XRows(const Int8Job& job, int64_t row, int64_t group, float* all_totals)
        : codes(job.codes + row * job.stride + group * kGroupValues),
          scales(job.scales + row * job.groups + group),
          offsets(job.offsets + row * job.groups + group),
          stride(job.stride),
          groups(job.groups),
          totals(all_totals + row * kInt8Columns) {}
};

// Four codes of Rows rows against those of the panel's columns.
template <int Rows>
HB_INLINE void add_step(const int8_t* codes, int64_t stride, const uint8_t* bytes, __m512i (*sums)[kVectors]) {
    __m512i weights[kVectors];
    for (int i = 0; i < kVectors; ++i) weights[i] = _mm512_load_si512(bytes + 64 * i);
    for (int r = 0; r < Rows; ++r) {
        int32_t four;
        memcpy(&four, codes + r * stride, sizeof four);
        const __m512i values = _mm512_set1_epi32(four);
        for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], weights[i], values);
    }
}

template <int Rows>
HB_NOINLINE void multiply(XRows x, Panel panel) {
    const uint8_t* bytes = panel.bytes;
    const float* absmax = panel.absmax;
    for (int64_t group = 0, in_block = panel.in_block; group < panel.groups; ++group) {
        __m512i sums[Rows][kVectors];
        for (int r = 0; r < Rows; ++r) {
            for (__m512i& sum : sums[r]) sum = _mm512_set1_epi32(x.offsets[r * x.groups + group]);
        }
        const int8_t* const codes = x.codes + group / 2 * kPairValues + group % 2 * (kGroupValues / 2);
        for (int64_t unit = 0; unit < kUnits; ++unit, bytes += 2 * kStepBytes) {
            add_step<Rows>(codes + unit * kUnitBytes, x.stride, bytes, sums);
            add_step<Rows>(codes + unit * kUnitBytes + kGroupValues, x.stride, bytes + kStepBytes, sums);
        }
        asm("" : "+r"(x.totals));  // or GCC keeps totals in registers too, and sums in memory
        __m512 maxima[kVectors];
        for (int i = 0; i < kVectors; ++i) maxima[i] = _mm512_loadu_ps(absmax + i * kLanes);
        for (int r = 0; r < Rows; ++r) {
            const __m512 scale = _mm512_set1_ps(x.scales[r * x.groups + group]);
            for (int i = 0; i < kVectors; ++i) {
                const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), _mm512_mul_ps(maxima[i], scale));
                float* const total = x.totals + r * kInt8Columns + i * kLanes;
                _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product));
            }
        }
        if (++in_block == panel.per_block) in_block = 0, absmax += kInt8Columns;
    }
}

template <int Rows = kMostRows>
void multiply_rows(int64_t rows, const XRows& x, const Panel& panel) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_rows<Rows - 1>(rows, x, panel);
    }
    multiply<Rows>(x, panel);
}

}  // namespace

void run_int8_columns(const Int8Job& job, int64_t n, int64_t columns, const float* absmax, uint8_t* panel,
                      float* totals) {
    const hb_linear4_args& a = *job.args;
    const __m512i table = unsigned_table(a.format);
    const int64_t per_block = a.blocksize / kGroupValues, groups = a.K / kGroupValues, row_bytes = a.K / 2;
    memset(totals, 0, static_cast<size_t>(job.rows * kInt8Columns) * sizeof(float));
    for (int64_t group = 0; group < groups; group += kPanelGroups) {
        const int64_t some = smaller(kPanelGroups, groups - group);
        for (int64_t i = 0; i < kVectors; ++i) {
            // Where a vector has no row, its lanes are those of the last one there is.
            const int64_t first = smaller(i * kLanes, columns - 1);
            const uint8_t* const codes = a.packed + (n + first) * row_bytes + group * (kGroupValues / 2);
            fill(codes, row_bytes, smaller(columns - first, kLanes), some * (kGroupValues / 2), table, panel + 64 * i);
        }
        const Panel filled = {panel, some, absmax + group / per_block * kInt8Columns, group % per_block, per_block};
        for (int64_t row = 0, shares = (job.rows + kMostRows - 1) / kMostRows; row < job.rows; --shares) {
            const int64_t together = (job.rows - row + shares - 1) / shares;  // evenly
            multiply_rows(together, XRows(job, row, group, totals), filled);
            row += together;
        }
    }
}

}  // namespace hb
