// The 4-bit matmul with int8 activations for AVX-512 with VNNI: 64 products of bytes an instruction, weights looked up
// as bytes, 64 codes a lookup. For weights whose rows are whole groups of 64 under one absmax each.
//
// A byte holds two codes, so the high nibbles of the 32 bytes of a group are its even codes and the low ones its odd
// codes. Two groups fill a register, and x is kept the same way, in pairs of groups:
//
//     x, natural [ group 0 | group 1 ]      kept [ 0 even | 1 even | 0 odd | 1 odd ]     32 bytes each
//
// The instruction multiplies unsigned by signed bytes: codes of the weight are looked up with 128 added, and 128 times
// the sum of x's codes is taken off again, once a group. A group's sum is an exact integer, so that the order inside it
// is free; groups are added up in float32 in their order.
//
// Few rows of x are computed here: products lie along K, and the sums of four weight rows and four groups are brought
// into sixteen lanes. For more, linear4_int8_columns.cpp has weight rows in lanes.
#include <immintrin.h>

#include "avx512.h"
#include "fetch.h"
#include "linear4_int8.h"
#include "linear4_int8_wide.h"

namespace hb {

namespace {

// --- few rows of x ---------------------------------------------------------------------------------------------------

// Of 64 bytes those that a row still has; none for a pair of groups beyond it.
HB_INLINE __mmask64 bytes_mask(int64_t bytes) {
    if (bytes <= 0) return 0;
    return bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
}

// Four weight rows' sums -> their quarters side by side: [quarter 0 of all four | quarter 1 | ...].
HB_INLINE __m512i add_quarters(const __m512i* sums) {
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Four weight rows, each beginning with a block; those beyond the last are the last once more, and nobody looks at
// their sums.
struct FourRows {
    const uint8_t* packed[4];
    const float* absmax[4];

    FourRows(const hb_linear4_args& a, int64_t n, const float* own_absmax) {
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t row = smaller(i, a.N - 1 - n);
            packed[i] = a.packed + (n + row) * (a.K / 2);
            absmax[i] = own_absmax + row * (a.K / a.blocksize);
        }
    }
};

// absmax of the four groups from `group` on, of four weight rows of `blocks` blocks: lane 4 g + row; 0 beyond the last.
// A block holds 2^shift groups.
HB_INLINE __m512 absmax_of_four(const FourRows& rows, int64_t blocks, int64_t group, int shift) {
    const int64_t block = group >> shift;
    const __mmask8 there = static_cast<__mmask8>(lanes_mask(smaller(blocks - block, 4)));
    __m512 loaded = _mm512_castps128_ps512(_mm_maskz_loadu_ps(there, rows.absmax[0] + block));
    loaded = _mm512_insertf32x4(loaded, _mm_maskz_loadu_ps(there, rows.absmax[1] + block), 1);
    loaded = _mm512_insertf32x4(loaded, _mm_maskz_loadu_ps(there, rows.absmax[2] + block), 2);
    loaded = _mm512_insertf32x4(loaded, _mm_maskz_loadu_ps(there, rows.absmax[3] + block), 3);
    const __m512i groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i first = _mm512_set1_epi32(static_cast<int>(group - (block << shift)));
    const __m512i own = _mm512_srl_epi32(_mm512_add_epi32(groups, first), _mm_cvtsi32_si128(shift));
    const __m512i of_row = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_permutexvar_ps(_mm512_add_epi32(own, of_row), loaded);
}

// One number for each of four groups -> in all four lanes of its group.
HB_INLINE __m512i spread(const void* four) {
    const __m512i groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m128i loaded = _mm_loadu_si128(static_cast<const __m128i*>(four));
    return _mm512_permutexvar_epi32(groups, _mm512_castsi128_si512(loaded));
}

// Four weight rows against Rows rows of x -> out[r * kPlainColumns + i].
template <int Rows>
void few(const Int8Job& job, const FourRows& rows, float* out) {
    const hb_linear4_args& a = *job.args;
    const __m512i table = unsigned_table(a.format);
    const int64_t row_bytes = a.K / 2, blocks = a.K / a.blocksize;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(a.blocksize / kGroupValues));
    const uint8_t* fetched = rows.packed[0] + fetch_distance(4, row_bytes);
    __m128 totals[Rows];
    for (int r = 0; r < Rows; ++r) totals[r] = _mm_setzero_ps();
    for (int64_t group = 0; group < job.groups; group += 4) {
        __m512i quarters[Rows][2];
        for (int pair = 0; pair < 2; ++pair) {
            const int64_t at = group / 2 * kPairBytes + pair * kPairBytes;
            const __mmask64 there = bytes_mask(row_bytes - at);
            __m512i high[4], low[4];
            for (int i = 0; i < 4; ++i, fetched += 64) {
                fetch_line(fetched);
                decode(_mm512_maskz_loadu_epi8(there, rows.packed[i] + at), table, high[i], low[i]);
            }
            for (int r = 0; r < Rows; ++r) {
                const int8_t* const codes = job.codes + r * job.stride + 2 * at;
                const __m512i even = _mm512_loadu_si512(codes), odd = _mm512_loadu_si512(codes + kPairBytes);
                __m512i sums[4];
                for (int i = 0; i < 4; ++i) {
                    sums[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high[i], even);
                    sums[i] = _mm512_dpbusd_epi32(sums[i], low[i], odd);
                }
                quarters[r][pair] = add_quarters(sums);
            }
        }
        const __m512 scale = absmax_of_four(rows, blocks, group, shift);
        for (int r = 0; r < Rows; ++r) {
            const int64_t own = r * job.groups + group;
            const __m512i halves = _mm512_add_epi32(_mm512_shuffle_i32x4(quarters[r][0], quarters[r][1], 0x88),
                                                    _mm512_shuffle_i32x4(quarters[r][0], quarters[r][1], 0xdd));
            const __m512i exact = _mm512_add_epi32(halves, spread(job.offsets + own));
            const __m512 factor = _mm512_mul_ps(scale, _mm512_castsi512_ps(spread(job.scales + own)));
            const __m512 products = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), factor);
            totals[r] = _mm_add_ps(totals[r], _mm512_castps512_ps128(products));
            totals[r] = _mm_add_ps(totals[r], _mm512_extractf32x4_ps(products, 1));
            totals[r] = _mm_add_ps(totals[r], _mm512_extractf32x4_ps(products, 2));
            totals[r] = _mm_add_ps(totals[r], _mm512_extractf32x4_ps(products, 3));
        }
    }
    for (int r = 0; r < Rows; ++r) _mm_storeu_ps(out + r * kPlainColumns, totals[r]);
}

template <int Rows = kFewRows>
void few_rows(const Int8Job& job, const FourRows& rows, float* out) {
    if constexpr (Rows > 1) {
        if (job.rows < Rows) return few_rows<Rows - 1>(job, rows, out);
    }
    few<Rows>(job, rows, out);
}

// --- scratch of one thread -------------------------------------------------------------------------------------------

// Where each part begins, in bytes.
struct Parts {
    bool is_few;
    int64_t columns;  // weight rows worked on together
    int64_t totals, absmax, turned, end;

    explicit Parts(const hb_linear4_args& a) : is_few(a.M <= kFewRows), columns(wide_columns(a)) {
        const int64_t rows = smaller(a.M, kInt8Rows), floats = sizeof(float);
        const int64_t of_absmax = columns * (a.K / a.blocksize) * floats;
        totals = is_few ? 0 : kPanelBytes;
        absmax = totals + rows * columns * floats;
        turned = absmax + (a.nested_absmax == nullptr ? 0 : of_absmax);
        end = turned + (is_few ? 0 : of_absmax);
    }
};

}  // namespace

void arrange_wide(const int8_t* natural, int64_t groups, int8_t* codes, int32_t* offsets) {
    for (int64_t group = 0; group < groups; group += 2) {  // a multiple of four
        const int64_t at = group * kGroupValues;
        for (int64_t i = 0; i < 2; ++i) {
            const __m512i values = _mm512_loadu_si512(natural + at + i * kGroupValues);
            const __m256i even = _mm512_cvtepi16_epi8(values);
            const __m256i odd = _mm512_cvtepi16_epi8(_mm512_srli_epi16(values, 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at + i * 32), even);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at + kGroupValues + i * 32), odd);
            const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), values);
            offsets[group + i] = -kWeightOffset * _mm512_reduce_add_epi32(sums);
        }
    }
}

int64_t wide_bytes(const hb_linear4_args& a) {
    return Parts(a).end;
}

void run_wide(const Int8Job& job, int64_t begin, int64_t end, char* scratch) {
    const hb_linear4_args& a = *job.args;
    const Parts parts(a);
    uint8_t* const panel = reinterpret_cast<uint8_t*>(scratch);
    float* const totals = reinterpret_cast<float*>(scratch + parts.totals);
    float* const room = reinterpret_cast<float*>(scratch + parts.absmax);
    float* const turned = reinterpret_cast<float*>(scratch + parts.turned);
    const int64_t blocks = a.K / a.blocksize;
    for (int64_t n = begin; n < end; n += parts.columns) {
        const int64_t columns = smaller(parts.columns, end - n);
        const float* const absmax = absmax_at(job.absmax, n * blocks, columns * blocks, room);
        fetch_absmax(job.absmax, (n + columns) * blocks, columns * blocks);
        if (parts.is_few) {
            for (int64_t i = 0; i < columns; i += 4) {
                few_rows(job, FourRows(a, n + i, absmax + i * blocks), totals + i);
            }
        } else {
            turn_absmax<kInt8Columns>(absmax, columns, blocks, turned);
            run_int8_columns(job, n, columns, turned, panel, totals);
        }
        for (int64_t row = 0; row < job.rows; ++row) finish_int8(job, row, n, columns, totals + row * parts.columns);
    }
}

}  // namespace hb
