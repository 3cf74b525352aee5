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
// Few rows of x: products lie along K, and the sums of four weight rows and four groups are brought into sixteen lanes.
// Many: a tile of 64 weight rows is turned while it is decoded, four codes of sixteen weight rows to a register, and
// meets x four codes at a time.
#include <immintrin.h>
#include <string.h>

#include "avx512.h"
#include "fetch.h"
#include "linear4_int8.h"

namespace hb {

namespace {

constexpr int64_t kPairBytes = 64;  // packed bytes of two groups
constexpr int64_t kPairValues = 2 * kGroupValues;
constexpr int64_t kLanes = 16;
constexpr int64_t kQuarters = kInt8TileColumns / kLanes;
constexpr int64_t kStepTile = kInt8TileColumns * 4;  // bytes of a tile that four codes of x meet
constexpr int64_t kGroupTile = kGroupValues * kInt8TileColumns;
constexpr int64_t kStretch = 16;  // groups of a tile that are decoded at a time: 64 KiB
constexpr int kManyRows = 4;
constexpr int kWeightOffset = 128;

HB_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

HB_INLINE __m512i unsigned_table(int64_t format) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(int8_table(format).at));
    return _mm512_broadcast_i32x4(_mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(kWeightOffset))));
}

HB_INLINE void decode(__m512i bytes, __m512i table, __m512i& high, __m512i& low) {
    const __m512i nibble = _mm512_set1_epi8(15);
    high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
    low = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble));
}

// Lane i of at[j] becomes lane j of at[i].
HB_INLINE void transpose(__m512i* at) {
    __m512i half[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(at[i], at[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(at[i], at[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i a = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xee);
        const __m512i e = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xee);
        at[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        at[4 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        at[8 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        at[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
}

// Sixteen weight rows from row n on; those beyond the last are the last once more, and nobody looks at their sums.
struct WeightRows {
    const uint8_t* at[kLanes];

    WeightRows(const hb_linear4_args& a, int64_t n) {
        for (int64_t i = 0; i < kLanes; ++i) at[i] = a.packed + smaller(n + i, a.N - 1) * (a.K / 2);
    }
};

// Of 64 bytes those that a row still has; none for a pair of groups beyond it.
HB_INLINE __mmask64 bytes_mask(int64_t bytes) {
    if (bytes <= 0) return 0;
    return bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
}

HB_INLINE __m512 add_group(__m512 total, __m512i sums, __m512 absmax, float scale) {
    const __m512 factor = _mm512_mul_ps(absmax, _mm512_set1_ps(scale));
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), factor));
}

// --- few rows of x ---------------------------------------------------------------------------------------------------

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

// --- many rows of x --------------------------------------------------------------------------------------------------

// Groups [first, first + count) of kInt8TileColumns weight rows from row n on -> tile[group][step][column][4 codes].
void fill_tile(const hb_linear4_args& a, int64_t n, int64_t first, int64_t count, uint8_t* tile) {
    const __m512i table = unsigned_table(a.format);
    for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
        const WeightRows rows(a, n + quarter * kLanes);
        const uint8_t* fetched = rows.at[0] + kInt8TileColumns * (a.K / 2) + first / 2 * kPairBytes * kLanes;
        for (int64_t group = 0; group < count; group += 2) {
            const int64_t at = (first + group) / 2 * kPairBytes;
            const __mmask64 there = bytes_mask(a.K / 2 - at);
            __m512i bytes[kLanes];
            for (int64_t i = 0; i < kLanes; ++i, fetched += 64) {
                __builtin_prefetch(fetched);
                bytes[i] = _mm512_maskz_loadu_epi8(there, rows.at[i] + at);
            }
            transpose(bytes);
            uint8_t* to = tile + group * kGroupTile + quarter * 64;
            for (int64_t i = 0; i < kLanes; ++i, to += 2 * kStepTile) {
                __m512i high, low;
                decode(bytes[i], table, high, low);
                _mm512_storeu_si512(to, high);
                _mm512_storeu_si512(to + kStepTile, low);
            }
        }
    }
}

// Rows of x, their scales and offsets from the first group of a stretch on, and the sums that they are added to.
struct XRows {
    const int8_t* codes;
    const float* scales;
    const int32_t* offsets;
    int64_t stride, groups;
    float* totals;  // [rows, kInt8TileColumns]
};

// Four codes of Rows rows of x against those of the tile's columns.
template <int Rows>
HB_INLINE void add_step(const int8_t* codes, int64_t stride, const uint8_t* tile, __m512i (*sums)[kQuarters]) {
    __m512i weights[kQuarters];
    for (int q = 0; q < kQuarters; ++q) weights[q] = _mm512_loadu_si512(tile + 64 * q);
    for (int r = 0; r < Rows; ++r) {
        int32_t four;
        memcpy(&four, codes + r * stride, sizeof four);
        const __m512i values = _mm512_set1_epi32(four);
        for (int q = 0; q < kQuarters; ++q) sums[r][q] = _mm512_dpbusd_epi32(sums[r][q], weights[q], values);
    }
}

// `count` groups of Rows rows of x against the tile. absmax: [kInt8TileColumns] of the first group's block; `in_block`:
// groups of that block that lie before the first.
template <int Rows>
HB_NOINLINE void multiply(const XRows& x, const uint8_t* tile, int64_t count, const float* absmax, int64_t in_block,
                          int64_t per_block) {
    for (int64_t group = 0; group < count; ++group) {
        __m512i sums[Rows][kQuarters];
        for (int r = 0; r < Rows; ++r) {
            const __m512i offset = _mm512_set1_epi32(x.offsets[r * x.groups + group]);
            for (int q = 0; q < kQuarters; ++q) sums[r][q] = offset;
        }
        const int8_t* const codes = x.codes + group / 2 * kPairValues + group % 2 * (kGroupValues / 2);
        for (int64_t at = 0; at < kGroupValues / 2; at += 4, tile += 2 * kStepTile) {
            add_step<Rows>(codes + at, x.stride, tile, sums);
            add_step<Rows>(codes + at + kGroupValues, x.stride, tile + kStepTile, sums);
        }
        for (int q = 0; q < kQuarters; ++q) {
            const __m512 scale = _mm512_loadu_ps(absmax + q * kLanes);
            for (int r = 0; r < Rows; ++r) {
                float* const total = x.totals + r * kInt8TileColumns + q * kLanes;
                const float own = x.scales[r * x.groups + group];
                _mm512_storeu_ps(total, add_group(_mm512_loadu_ps(total), sums[r][q], scale, own));
            }
        }
        if (++in_block == per_block) in_block = 0, absmax += kInt8TileColumns;
    }
}

template <int Rows = kManyRows>
void multiply_rows(int64_t rows, const XRows& x, const uint8_t* tile, int64_t count, const float* absmax,
                   int64_t in_block, int64_t per_block) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_rows<Rows - 1>(rows, x, tile, count, absmax, in_block, per_block);
    }
    multiply<Rows>(x, tile, count, absmax, in_block, per_block);
}

// All rows of x against kInt8TileColumns weight rows from row n on -> totals [rows, kInt8TileColumns].
void many(const Int8Job& job, int64_t n, const float* absmax, uint8_t* tile, float* totals) {
    const hb_linear4_args& a = *job.args;
    const int64_t per_block = a.blocksize / kGroupValues;
    memset(totals, 0, static_cast<size_t>(job.rows * kInt8TileColumns) * sizeof(float));
    const int64_t groups = a.K / kGroupValues;
    for (int64_t group = 0; group < groups; group += kStretch) {
        const int64_t count = smaller(kStretch, groups - group);
        fill_tile(a, n, group, count, tile);
        const float* const own = absmax + group / per_block * kInt8TileColumns;
        for (int64_t row = 0, blocks = (job.rows + kManyRows - 1) / kManyRows; row < job.rows; --blocks) {
            const int64_t together = (job.rows - row + blocks - 1) / blocks;  // evenly: 4 and 4 beat 6 and 2
            const int64_t at = row * job.groups + group;
            const XRows x = {job.codes + row * job.stride + group * kGroupValues,
                             job.scales + at,
                             job.offsets + at,
                             job.stride,
                             job.groups,
                             totals + row * kInt8TileColumns};
            multiply_rows(together, x, tile, count, own, group % per_block, per_block);
            row += together;
        }
    }
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
        totals = is_few ? 0 : kStretch * kGroupTile;
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
    uint8_t* const tile = reinterpret_cast<uint8_t*>(scratch);
    float* const totals = reinterpret_cast<float*>(scratch + parts.totals);
    float* const room = reinterpret_cast<float*>(scratch + parts.absmax);
    float* const turned = reinterpret_cast<float*>(scratch + parts.turned);
    const int64_t blocks = a.K / a.blocksize;
    for (int64_t n = begin; n < end; n += parts.columns) {
        const int64_t columns = smaller(parts.columns, end - n);
        const float* const absmax = absmax_at(job.absmax, n * blocks, columns * blocks, room);
        if (parts.is_few) {
            for (int64_t i = 0; i < columns; i += 4) {
                few_rows(job, FourRows(a, n + i, absmax + i * blocks), totals + i);
            }
        } else {
            turn_absmax<kInt8TileColumns>(absmax, columns, blocks, turned);
            many(job, n, turned, tile, totals);
        }
        for (int64_t row = 0; row < job.rows; ++row) finish_int8(job, row, n, columns, totals + row * parts.columns);
    }
}

}  // namespace hb
