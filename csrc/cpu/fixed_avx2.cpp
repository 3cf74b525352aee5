// Products with decoded weights in 16-bit fixed point for AVX2; fixed.h says what is computed.
//
// Few rows of x meet codes from register to register, eight weight rows together: a lane adds up products along K, and
// at the end of a group the eight rows' lanes are added to one vector of sums. More rows meet a panel of sixteen weight
// rows, a lane each, as in columns.h; a pair of x is loaded into every lane.
//
// Sums of a group are exact, and what follows is the same in both: the product of the group's scales, which is exact
// but for subnormal ones, and one fused addition; with x in int8, products and sums rounded one by one. So a row has
// the same bits whatever else there is.
#include <immintrin.h>
#include <string.h>

#include "clones.h"
#include "fixed_weights.h"
#include "floats.h"

namespace hb {

namespace {

constexpr int kMostRows = 4;  // of x that meet a panel from registers
constexpr int64_t kGroupPairs = kFixedGroup / 2;
constexpr int64_t kChunk = 16;  // bytes of a row of codes that are transposed together

// --- what both ways end with --------------------------------------------------------------------------------------

// Sums of a group times absmax and what a unit of x stands for, added to a total.
template <bool Fuses>
HB_INLINE __m256 add_group(__m256 total, __m256i sums, __m256 scales, const float* x_scale) {
    const __m256 factors = _mm256_mul_ps(scales, _mm256_broadcast_ss(x_scale)), floats = _mm256_cvtepi32_ps(sums);
    return Fuses ? _mm256_fmadd_ps(floats, factors, total) : _mm256_add_ps(total, _mm256_mul_ps(floats, factors));
}

// Totals [rows][Columns] and the bias, rounded -> columns [n, n + columns) of out.
template <int64_t Columns>
HB_INLINE void hand_out(const DecodedCall& a, const DecodedRows& rows, int64_t n, int64_t columns, float* totals) {
    float biases[Columns] = {};
    for (int64_t i = 0; i < columns && a.bias != nullptr; ++i) biases[i] = load_float(a.bias, a.bias_dtype, n + i);
    for (int64_t r = 0; r < rows.count; ++r, totals += Columns) {
        for (int64_t i = 0; i < Columns; ++i) totals[i] += biases[i];
        store_floats(totals, columns, a.out, a.x_dtype, (rows.first + r) * a.out_stride + n);
    }
}

// --- few rows of x ------------------------------------------------------------------------------------------------

// Eight sums of eight lanes each -> one of each.
HB_INLINE __m256i add_lanes(const __m256i* sums) {
    __m256i four[2];
    for (int i = 0; i < 2; ++i, sums += 4) {
        const __m256i a =
            _mm256_add_epi32(_mm256_unpacklo_epi32(sums[0], sums[1]), _mm256_unpackhi_epi32(sums[0], sums[1]));
        const __m256i b =
            _mm256_add_epi32(_mm256_unpacklo_epi32(sums[2], sums[3]), _mm256_unpackhi_epi32(sums[2], sums[3]));
        four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    return _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                            _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// Rows of x as load_fixed_avx2 has them.
struct FixedX {
    const int16_t* values;
    int64_t stride;
    const float* scales;
    int64_t groups;
};

// Eight weight rows, `row_bytes` apart, against Rows rows of x -> totals [Rows][8]. Fetches as many that lie `ahead`.
template <int Rows, typename Kind>
HB_NOINLINE void few(const FixedX& x, const uint8_t* codes, int64_t row_bytes, int64_t ahead, const Kind& kind,
                     const float* scales, float* out) {
    const uint8_t* fetched = codes + ahead;
    __m256 totals[Rows];
    for (__m256& total : totals) total = _mm256_setzero_ps();
    for (int64_t group = 0; group < x.groups; ++group, codes += Kind::kGroupBytes, scales += kLanes) {
        for (int64_t i = 0; i < Kind::kGroupBytes * kLanes; i += 64, fetched += 64) fetch_line(fetched);
        __m256i sums[Rows][kLanes];
        for (int64_t n = 0; n < kLanes; ++n) {
            typename Kind::Few weights;
            kind.decode(codes + n * row_bytes, weights);
            for (int r = 0; r < Rows; ++r) {
                sums[r][n] = Kind::multiply(x.values + r * x.stride + group * kFixedGroup, weights);
            }
        }
        for (int r = 0; r < Rows; ++r) {
            totals[r] = add_group<Kind::kFuses>(totals[r], add_lanes(sums[r]), _mm256_loadu_ps(scales),
                                                x.scales + r * x.groups + group);
        }
    }
    for (int r = 0; r < Rows; ++r) _mm256_storeu_ps(out + r * kLanes, totals[r]);
}

template <typename Kind, int Rows = kFewFixedRows>
HB_INLINE void few_rows(int64_t rows, const FixedX& x, const uint8_t* codes, int64_t row_bytes, int64_t ahead,
                        const Kind& kind, const float* scales, float* out) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return few_rows<Kind, Rows - 1>(rows, x, codes, row_bytes, ahead, kind, scales, out);
    }
    few<Rows>(x, codes, row_bytes, ahead, kind, scales, out);
}

template <typename Kind>
HB_INLINE void run_few(const DecodedCall& a, const DecodedRows& rows, const Kind& kind, int64_t begin, int64_t end,
                       char* scratch) {
    const FixedScratch parts(a, rows.count);
    float* const room = reinterpret_cast<float*>(scratch);
    float* const scales = room + parts.absmax / int64_t{sizeof(float)};
    const FixedLayout layout(a, rows.count);
    const FixedX x = {reinterpret_cast<const int16_t*>(rows.x), layout.stride,
                      reinterpret_cast<const float*>(rows.x + layout.scales), layout.groups};
    const int64_t row_bytes = layout.groups * Kind::kGroupBytes;
    const int64_t ahead = fetch_distance(kLanes, row_bytes);
    const int64_t last = end * kLanes < a.N ? end * kLanes : a.N;
    for (int64_t n = begin * kLanes; n < last; n += kLanes) {
        const int64_t columns = last - n < kLanes ? last - n : kLanes;
        const uint8_t* const codes = a.weight.codes + n * row_bytes;
        load_scales<kLanes>(a, n, columns, Kind::unit(a.weight), room, scales);
        float totals[kFewFixedRows * kLanes];
        if (columns == kLanes) {
            few_rows(rows.count, x, codes, row_bytes, ahead, kind, scales, totals);
        } else {  // what is not eight rows: each one eight times
            for (int64_t i = 0; i < columns; ++i) {
                float own[kFewFixedRows * kLanes];
                few_rows(rows.count, x, codes + i * row_bytes, 0, ahead, kind, scales, own);
                for (int64_t r = 0; r < rows.count; ++r) totals[r * kLanes + i] = own[r * kLanes + i];
            }
        }
        hand_out<kLanes>(a, rows, n, columns, totals);
    }
}

// --- more rows of x -----------------------------------------------------------------------------------------------

// `bytes` bytes of codes of eight rows -> their vectors of a panel; in place of rows that are not there, the last one.
// Fetches those of the next panel.
template <typename Kind>
HB_INLINE void fill(const uint8_t* codes, int64_t row_bytes, int64_t there, int64_t bytes, const Kind& kind,
                    char* panel) {
    const uint8_t* from[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) from[i] = codes + (i < there ? i : there - 1) * row_bytes;
    for (int64_t at = 0; at < bytes; at += kChunk, panel += kChunk * kGroupPairs / Kind::kGroupBytes * kPairBytes) {
        __m256i rows[4];
        for (int i = 0; i < 4; ++i) {
            rows[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(from[i + 4] + at),
                                          reinterpret_cast<const __m128i*>(from[i] + at));
        }
        if (at % 64 == 0) {
            for (const uint8_t* const row : from) __builtin_prefetch(row + kFixedColumns * row_bytes + at, 0, 2);
        }
        kind.decode_columns(rows, panel);
    }
}

// Rows rows of x against a panel of `groups` groups; totals [Rows][16].
template <int Rows, bool Fuses>
HB_NOINLINE void multiply(const FixedX& x, const char* panel, int64_t groups, const float* scales, float* totals) {
    const int16_t* values = x.values;
    for (int64_t group = 0; group < groups; ++group, scales += kFixedColumns) {
        __m256i sums[Rows][kVectors];
        for (auto& row : sums) {
            for (__m256i& sum : row) sum = _mm256_setzero_si256();
        }
        for (int64_t pair = 0; pair < kGroupPairs; ++pair, panel += kPairBytes, values += 2) {
            const __m256i weights[kVectors] = {load(panel), load(panel + 32)};
            for (int r = 0; r < Rows; ++r) {
                int32_t two;
                memcpy(&two, values + r * x.stride, sizeof two);
                for (int i = 0; i < kVectors; ++i) {
                    add_to(sums[r][i], _mm256_madd_epi16(_mm256_set1_epi32(two), weights[i]));
                }
            }
        }
        for (int r = 0; r < Rows; ++r) {
            for (int i = 0; i < kVectors; ++i) {
                float* const total = totals + r * kFixedColumns + i * kLanes;
                _mm256_storeu_ps(
                    total, add_group<Fuses>(_mm256_loadu_ps(total), sums[r][i], _mm256_loadu_ps(scales + i * kLanes),
                                            x.scales + r * x.groups + group));
            }
        }
    }
}

template <bool Fuses, int Rows = kMostRows>
HB_INLINE void multiply_rows(int64_t rows, const FixedX& x, const char* panel, int64_t groups, const float* scales,
                             float* totals) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_rows<Fuses, Rows - 1>(rows, x, panel, groups, scales, totals);
    }
    multiply<Rows, Fuses>(x, panel, groups, scales, totals);
}

template <typename Kind>
HB_INLINE void run_columns(const DecodedCall& a, const DecodedRows& rows, const Kind& kind, int64_t begin, int64_t end,
                           char* scratch) {
    const FixedScratch parts(a, rows.count);
    char* const panel = scratch;
    float* const totals = reinterpret_cast<float*>(panel + parts.panel);
    float* const room = totals + parts.totals / int64_t{sizeof(float)};
    float* const scales = room + parts.absmax / int64_t{sizeof(float)};
    const FixedLayout layout(a, rows.count);
    const int64_t row_bytes = layout.groups * Kind::kGroupBytes;
    const int64_t last = end * kFixedColumns < a.N ? end * kFixedColumns : a.N;
    for (int64_t n = begin * kFixedColumns; n < last; n += kFixedColumns) {
        const int64_t columns = last - n < kFixedColumns ? last - n : kFixedColumns;
        load_scales<kFixedColumns>(a, n, columns, Kind::unit(a.weight), room, scales);
        memset(totals, 0, static_cast<size_t>(parts.totals));
        for (int64_t k = 0; k < a.K; k += kFixedPanel) {
            const int64_t groups = (a.K - k < kFixedPanel ? a.K - k : kFixedPanel) / kFixedGroup;
            const int64_t first_group = k / kFixedGroup;
            for (int64_t i = 0; i < kVectors; ++i) {
                // Where a vector has no row, its lanes are those of the last one there is.
                const int64_t first = i * kLanes < columns ? i * kLanes : columns - 1;
                const uint8_t* const codes = a.weight.codes + (n + first) * row_bytes + first_group * Kind::kGroupBytes;
                fill(codes, row_bytes, columns - first, groups * Kind::kGroupBytes, kind, panel + 32 * i);
            }
            for (int64_t row = 0, shares = (rows.count + kMostRows - 1) / kMostRows; row < rows.count; --shares) {
                const int64_t together = (rows.count - row + shares - 1) / shares;
                const FixedX x = {
                    reinterpret_cast<const int16_t*>(rows.x) + row * layout.stride + k, layout.stride,
                    reinterpret_cast<const float*>(rows.x + layout.scales) + row * layout.groups + first_group,
                    layout.groups};
                multiply_rows<Kind::kFuses>(together, x, panel, groups, scales + first_group * kFixedColumns,
                                            totals + row * kFixedColumns);
                row += together;
            }
        }
        hand_out<kFixedColumns>(a, rows, n, columns, totals);
    }
}

// Calls body(kind) with how a call's weight becomes integers.
template <typename Body>
HB_INLINE void with_kind(const DecodedCall& a, const Body& body) {
    if (a.weight.is_int8) {
        body(EightBits());
    } else if (a.rounds_x) {
        body(FourBitsInInt8(a.weight));
    } else {
        body(FourBits(a.weight));
    }
}

}  // namespace

void run_few_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    with_kind(a, [&](const auto& kind) { run_few(a, rows, kind, begin, end, scratch); });
}

void run_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    with_kind(a, [&](const auto& kind) { run_columns(a, rows, kind, begin, end, scratch); });
}

}  // namespace hb
