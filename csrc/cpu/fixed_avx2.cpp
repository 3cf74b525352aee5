// Products with decoded weights in 16-bit fixed point for AVX2; fixed.h says what is computed.
//
// Few rows of x meet codes from register to register, eight weight rows together: a lane adds up products along K, and
// at the end of a group the eight rows' lanes are added to one vector of sums. More rows meet a panel of sixteen weight
// rows, a lane each, as in columns.h; a pair of x is loaded into every lane.
//
// Sums of a group are exact, and what follows is the same in both: the product of the group's scales, which is exact
// but for subnormal ones, and one fused addition. So a row has the same bits whatever else there is.
#include <immintrin.h>
#include <string.h>

#include "clones.h"
#include "fetch.h"
#include "fixed.h"
#include "floats.h"
#include "formats.h"

namespace hb {

namespace {

constexpr int64_t kLanes = 8;
constexpr int kVectors = 2;   // of sums, for a row of x and a panel
constexpr int kMostRows = 4;  // of x that meet a panel from registers
constexpr int64_t kPairBytes = kVectors * 32;
constexpr int64_t kGroupPairs = kFixedGroup / 2;
constexpr int64_t kChunk = 16;  // bytes of a row of codes that are transposed together
static_assert(kFixedColumns == kVectors * kLanes && kFewFixedColumns == kLanes, "lanes are weight rows");

static_assert(((int64_t{1} << kFixedBits4) - 1) * kLargestFixedWeight * kFixedGroup <= INT32_MAX, "exact sums");
static_assert(((int64_t{1} << kFixedBits8) - 1) * 128 * kFixedGroup <= INT32_MAX && kFixedBits8 < 16, "exact sums");

HB_INLINE __m256i load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// sum += term, here and in place: left to itself, GCC 12 keeps terms on the stack and adds them up at the end, or
// copies each sum once more.
HB_INLINE void add_to(__m256i& sum, __m256i term) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term));
}

// --- rows of x ----------------------------------------------------------------------------------------------------

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
// The exponent below which a group's power of two does not go, so that it is a normal number: 2^-100 and less count as
// the integers that they are of that one.
constexpr int32_t kLowestExponent = 127 - 100;

// The bits of the largest magnitude; those of a NaN are larger than those of infinity.
HB_INLINE uint32_t largest_bits(const float* values) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < kFixedGroup; i += kLanes) {
        const __m256i magnitudes =
            _mm256_and_si256(load(values + i), _mm256_set1_epi32(static_cast<int32_t>(kMagnitude)));
        largest = _mm256_max_epi32(largest, magnitudes);
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

// Sixteen values times a power of two, to nearest.
HB_INLINE __m256i integers(const float* values, __m256 power) {
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), power));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + kLanes), power));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
}

// A group with an infinity: what is finite beside it counts for nothing.
HB_INLINE void signs_of_infinities(const float* values, float* out) {
    for (int64_t i = 0; i < kFixedGroup; ++i) {
        const uint32_t bits = bits_of(values[i]);
        out[i] = (bits & kMagnitude) < kInfinity ? 0.0f : (bits >> 31) != 0 ? -1.0f : 1.0f;
    }
}

// A group -> integers of `bits` bits, and what one of them stands for.
HB_INLINE float round_group(const float* values, int bits, __m256i (&out)[4]) {
    const uint32_t largest = largest_bits(values);
    float signs[kFixedGroup], scale = float_of(largest), power = 1.0f;
    if (largest >= kInfinity) {
        signs_of_infinities(values, signs);
        values = signs;
    } else {
        const int32_t exponent = static_cast<int32_t>(largest >> 23);
        const int32_t unit = (exponent < kLowestExponent ? kLowestExponent : exponent) - (bits - 1);
        scale = float_of(static_cast<uint32_t>(unit) << 23);
        power = float_of(static_cast<uint32_t>(254 - unit) << 23);
    }
    for (int i = 0; i < 4; ++i) out[i] = integers(values + 16 * i, _mm256_set1_ps(power));
    return scale;
}

// The integers of even and of odd columns, in two halves of 32-bit lanes.
HB_INLINE __m256i even(__m256i values) {
    return _mm256_srai_epi32(_mm256_slli_epi32(values, 16), 16);
}
HB_INLINE __m256i odd(__m256i values) {
    return _mm256_srai_epi32(values, 16);
}

// As FourBits::decode hands out the codes: the even columns of the group's halves, then the odd ones.
HB_INLINE void part_columns(__m256i (&values)[4]) {
    const __m256i evens[2] = {_mm256_packs_epi32(even(values[0]), even(values[2])),
                              _mm256_packs_epi32(even(values[1]), even(values[3]))};
    const __m256i odds[2] = {_mm256_packs_epi32(odd(values[0]), odd(values[2])),
                             _mm256_packs_epi32(odd(values[1]), odd(values[3]))};
    for (int i = 0; i < 2; ++i) {
        values[i] = _mm256_permute4x64_epi64(evens[i], 0xd8);
        values[2 + i] = _mm256_permute4x64_epi64(odds[i], 0xd8);
    }
}

// --- weights ------------------------------------------------------------------------------------------------------

// How each kind of weight goes from codes to 16-bit integers.
struct FourBits {
    static constexpr int64_t kGroupBytes = kFixedGroup / 2;
    static constexpr int64_t kUnitPairs = 4;  // in four bytes

    __m256i low, high;  // bytes of the table's entries

    HB_INLINE explicit FourBits(const DecodedWeight& weight) {
        const Table<int16_t, 16>& table = weight.format == HB_NF4 ? kNf4Fixed : kFp4Fixed;
        const __m256i entries = load(table.at), byte = _mm256_set1_epi16(255);
        const __m256i lows = _mm256_and_si256(entries, byte), highs = _mm256_srli_epi16(entries, 8);
        low = _mm256_permute4x64_epi64(_mm256_packus_epi16(lows, lows), 0x88);
        high = _mm256_permute4x64_epi64(_mm256_packus_epi16(highs, highs), 0x88);
    }

    // The entries of the first eight codes in each half, and of the others.
    HB_INLINE void look_up(__m256i codes, __m256i& first, __m256i& second) const {
        const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
        first = _mm256_unpacklo_epi8(lows, highs);
        second = _mm256_unpackhi_epi8(lows, highs);
    }
    HB_INLINE void decode(const uint8_t* codes, __m256i (&values)[4]) const {
        const __m256i bytes = load(codes), nibble = _mm256_set1_epi8(15);
        look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), values[0], values[1]);
        look_up(_mm256_and_si256(bytes, nibble), values[2], values[3]);
    }

    // Sixteen bytes of eight rows, of rows i and i + 4 in rows[i] -> their pairs, one behind the other.
    HB_INLINE void decode_columns(const __m256i (&rows)[4], char* pairs) const {
        const __m256i firsts[2] = {_mm256_unpacklo_epi8(rows[0], rows[2]), _mm256_unpackhi_epi8(rows[0], rows[2])};
        const __m256i seconds[2] = {_mm256_unpacklo_epi8(rows[1], rows[3]), _mm256_unpackhi_epi8(rows[1], rows[3])};
        for (int i = 0; i < 2; ++i, pairs += 8 * kPairBytes) {
            decode_bytes(_mm256_unpacklo_epi8(firsts[i], seconds[i]), pairs);
            decode_bytes(_mm256_unpackhi_epi8(firsts[i], seconds[i]), pairs + 4 * kPairBytes);
        }
    }
    static float unit(const DecodedWeight& weight) { return weight.format == HB_NF4 ? kNf4FixedUnit : kFp4FixedUnit; }

  private:
    // Four bytes of each row, in the order of the bytes.
    HB_INLINE void decode_bytes(__m256i bytes, char* pairs) const {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i first[2], second[2];
        look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), first[0], first[1]);
        look_up(_mm256_and_si256(bytes, nibble), second[0], second[1]);
        for (int i = 0; i < 2; ++i, pairs += 2 * kPairBytes) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm256_unpacklo_epi16(first[i], second[i]));
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + kPairBytes),
                               _mm256_unpackhi_epi16(first[i], second[i]));
        }
    }
};

struct EightBits {
    static constexpr int64_t kGroupBytes = kFixedGroup;
    static constexpr int64_t kUnitPairs = 2;

    HB_INLINE explicit EightBits(const DecodedWeight&) {}
    static HB_INLINE void decode(const uint8_t* codes, __m256i (&values)[4]) {
        for (int i = 0; i < 4; ++i) {
            values[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
        }
    }
    static HB_INLINE void decode_columns(const __m256i (&rows)[4], char* pairs) {
        // Units of two codes: those of rows 0 and 2, of 1 and 3, then of all four.
        const __m256i firsts[2] = {_mm256_unpacklo_epi16(rows[0], rows[2]), _mm256_unpackhi_epi16(rows[0], rows[2])};
        const __m256i seconds[2] = {_mm256_unpacklo_epi16(rows[1], rows[3]), _mm256_unpackhi_epi16(rows[1], rows[3])};
        for (int i = 0; i < 2; ++i, pairs += 4 * kPairBytes) {
            widen(_mm256_unpacklo_epi16(firsts[i], seconds[i]), pairs);
            widen(_mm256_unpackhi_epi16(firsts[i], seconds[i]), pairs + 2 * kPairBytes);
        }
    }
    static float unit(const DecodedWeight&) { return kInt8Max; }

  private:
    static HB_INLINE void widen(__m256i codes, char* pairs) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm256_srai_epi16(_mm256_unpacklo_epi8(codes, codes), 8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + kPairBytes),
                           _mm256_srai_epi16(_mm256_unpackhi_epi8(codes, codes), 8));
    }
};

// Four values of eight rows, of rows i and i + 4 in rows[i] -> each value's eight.
HB_INLINE void turn(__m256 (&rows)[4]) {
    const __m256 a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpacklo_ps(rows[2], rows[3]);
    const __m256 c = _mm256_unpackhi_ps(rows[0], rows[1]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
    rows[0] = _mm256_shuffle_ps(a, b, 0x44), rows[1] = _mm256_shuffle_ps(a, b, 0xee);
    rows[2] = _mm256_shuffle_ps(c, d, 0x44), rows[3] = _mm256_shuffle_ps(c, d, 0xee);
}

// absmax [columns, blocks] -> scales[group * Columns + column], divided by the unit; of columns beyond, the last one's.
template <int64_t Columns>
HB_INLINE void turn_absmax(const float* absmax, int64_t columns, const DecodedCall& a, float unit, float* scales) {
    const int64_t blocks = a.K / a.weight.blocksize, groups = a.weight.blocksize / kFixedGroup;
    const __m256 step = _mm256_set1_ps(1 / unit);
    for (int64_t first = 0; first < Columns; first += kLanes) {
        float* to = scales + first;
        for (int64_t block = 0; block < blocks; block += 4) {
            const int64_t some = blocks - block < 4 ? blocks - block : 4;
            const __m128i there =
                _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int32_t>(some)), _mm_setr_epi32(0, 1, 2, 3));
            __m256 rows[4];
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t row = first + i < columns ? first + i : columns - 1;
                const int64_t other = first + i + 4 < columns ? first + i + 4 : columns - 1;
                rows[i] = _mm256_set_m128(_mm_maskload_ps(absmax + other * blocks + block, there),
                                          _mm_maskload_ps(absmax + row * blocks + block, there));
            }
            turn(rows);
            for (int64_t i = 0; i < some; ++i) {
                const __m256 scale = _mm256_mul_ps(rows[i], step);
                for (int64_t group = 0; group < groups; ++group, to += Columns) _mm256_storeu_ps(to, scale);
            }
        }
    }
}

// The absmax of weight rows [n, n + columns) -> scales, by way of `room`. Fetches those that follow.
template <int64_t Columns>
HB_INLINE void load_scales(const DecodedCall& a, int64_t n, int64_t columns, float unit, float* room, float* scales) {
    const int64_t blocks = a.K / a.weight.blocksize;
    turn_absmax<Columns>(absmax_at(a.weight.absmax, n * blocks, columns * blocks, room), columns, a, unit, scales);
    fetch_absmax(a.weight.absmax, (n + columns) * blocks, Columns * blocks);
}

// --- what both ways end with --------------------------------------------------------------------------------------

// Sums of a group times absmax and what a unit of x stands for, added to a total.
HB_INLINE __m256 add_group(__m256 total, __m256i sums, __m256 scales, const float* x_scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scales, _mm256_broadcast_ss(x_scale)), total);
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

// Eight weight rows, `row_bytes` apart, against Rows rows of x -> totals [Rows][8].
template <int Rows, typename Kind>
HB_NOINLINE void few(const FixedX& x, const uint8_t* codes, int64_t row_bytes, const Kind& kind, const float* scales,
                     float* out) {
    const uint8_t* fetched = codes + fetch_distance(kLanes, row_bytes);
    __m256 totals[Rows];
    for (__m256& total : totals) total = _mm256_setzero_ps();
    for (int64_t group = 0; group < x.groups; ++group, codes += Kind::kGroupBytes, scales += kLanes) {
        for (int64_t i = 0; i < Kind::kGroupBytes * kLanes; i += 64, fetched += 64) fetch_line(fetched);
        __m256i sums[Rows][kLanes];
        for (int64_t n = 0; n < kLanes; ++n) {
            __m256i weights[4];
            kind.decode(codes + n * row_bytes, weights);
            for (int r = 0; r < Rows; ++r) {
                const int16_t* const values = x.values + r * x.stride + group * kFixedGroup;
                __m256i sum = _mm256_madd_epi16(load(values), weights[0]);
                for (int i = 1; i < 4; ++i) add_to(sum, _mm256_madd_epi16(load(values + 16 * i), weights[i]));
                sums[r][n] = sum;
            }
        }
        for (int r = 0; r < Rows; ++r) {
            totals[r] =
                add_group(totals[r], add_lanes(sums[r]), _mm256_loadu_ps(scales), x.scales + r * x.groups + group);
        }
    }
    for (int r = 0; r < Rows; ++r) _mm256_storeu_ps(out + r * kLanes, totals[r]);
}

template <typename Kind, int Rows = kFewFixedRows>
HB_INLINE void few_rows(int64_t rows, const FixedX& x, const uint8_t* codes, int64_t row_bytes, const Kind& kind,
                        const float* scales, float* out) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return few_rows<Kind, Rows - 1>(rows, x, codes, row_bytes, kind, scales, out);
    }
    few<Rows>(x, codes, row_bytes, kind, scales, out);
}

template <typename Kind>
HB_INLINE void run_few(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    const FixedScratch parts(a, rows.count);
    float* const room = reinterpret_cast<float*>(scratch);
    float* const scales = room + parts.absmax / int64_t{sizeof(float)};
    const FixedLayout layout(a, rows.count);
    const FixedX x = {reinterpret_cast<const int16_t*>(rows.x), layout.stride,
                      reinterpret_cast<const float*>(rows.x + layout.scales), layout.groups};
    const Kind kind(a.weight);
    const int64_t row_bytes = layout.groups * Kind::kGroupBytes;
    const int64_t last = end * kLanes < a.N ? end * kLanes : a.N;
    for (int64_t n = begin * kLanes; n < last; n += kLanes) {
        const int64_t columns = last - n < kLanes ? last - n : kLanes;
        const uint8_t* const codes = a.weight.codes + n * row_bytes;
        load_scales<kLanes>(a, n, columns, Kind::unit(a.weight), room, scales);
        float totals[kFewFixedRows * kLanes];
        if (columns == kLanes) {
            few_rows(rows.count, x, codes, row_bytes, kind, scales, totals);
        } else {  // what is not eight rows: each one eight times
            for (int64_t i = 0; i < columns; ++i) {
                float own[kFewFixedRows * kLanes];
                few_rows(rows.count, x, codes + i * row_bytes, 0, kind, scales, own);
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
    for (int64_t at = 0; at < bytes; at += kChunk, panel += kChunk / 4 * Kind::kUnitPairs * kPairBytes) {
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
template <int Rows>
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
                _mm256_storeu_ps(total,
                                 add_group(_mm256_loadu_ps(total), sums[r][i], _mm256_loadu_ps(scales + i * kLanes),
                                           x.scales + r * x.groups + group));
            }
        }
    }
}

template <int Rows = kMostRows>
HB_INLINE void multiply_rows(int64_t rows, const FixedX& x, const char* panel, int64_t groups, const float* scales,
                             float* totals) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_rows<Rows - 1>(rows, x, panel, groups, scales, totals);
    }
    multiply<Rows>(x, panel, groups, scales, totals);
}

template <typename Kind>
HB_INLINE void run_columns(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    const FixedScratch parts(a, rows.count);
    char* const panel = scratch;
    float* const totals = reinterpret_cast<float*>(panel + parts.panel);
    float* const room = totals + parts.totals / int64_t{sizeof(float)};
    float* const scales = room + parts.absmax / int64_t{sizeof(float)};
    const FixedLayout layout(a, rows.count);
    const Kind kind(a.weight);
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
            for (int64_t row = 0, shares = ceil_div(rows.count, kMostRows); row < rows.count; --shares) {
                const int64_t together = ceil_div(rows.count - row, shares);
                const FixedX x = {
                    reinterpret_cast<const int16_t*>(rows.x) + row * layout.stride + k, layout.stride,
                    reinterpret_cast<const float*>(rows.x + layout.scales) + row * layout.groups + first_group,
                    layout.groups};
                multiply_rows(together, x, panel, groups, scales + first_group * kFixedColumns,
                              totals + row * kFixedColumns);
                row += together;
            }
        }
        hand_out<kFixedColumns>(a, rows, n, columns, totals);
    }
}

}  // namespace

void load_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end) {
    const FixedLayout layout(a, rows.count);
    const int bits = a.weight.is_int8 ? kFixedBits8 : kFixedBits4;
    const bool are_parted = rows.count <= kFewFixedRows && !a.weight.is_int8;
    for (int64_t row = begin; row < end; ++row) {
        int16_t* to = reinterpret_cast<int16_t*>(rows.x) + row * layout.stride;
        float* const scales = reinterpret_cast<float*>(rows.x + layout.scales) + row * layout.groups;
        for (int64_t group = 0; group < layout.groups; ++group, to += kFixedGroup) {
            float values[kFixedGroup];
            load_floats(a.x, a.x_dtype, (rows.first + row) * a.K + group * kFixedGroup, kFixedGroup, values);
            __m256i integers_of[4];
            scales[group] = round_group(values, bits, integers_of);
            if (are_parted) part_columns(integers_of);
            for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), integers_of[i]);
        }
    }
}

void run_few_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    if (a.weight.is_int8) {
        run_few<EightBits>(a, rows, begin, end, scratch);
    } else {
        run_few<FourBits>(a, rows, begin, end, scratch);
    }
}

void run_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    if (a.weight.is_int8) {
        run_columns<EightBits>(a, rows, begin, end, scratch);
    } else {
        run_columns<FourBits>(a, rows, begin, end, scratch);
    }
}

}  // namespace hb
