// Weights in fixed point (fixed.h): how each kind goes from codes to integers of 16 bits, or to bytes for few rows of x
// in int8, and how their absmax becomes scales. Included only by fixed_avx2.cpp, which is compiled for AVX2.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "clones.h"
#include "fetch.h"
#include "fixed.h"
#include "formats.h"
#include "linear4_int8.h"

namespace hb {

namespace {

constexpr int64_t kLanes = 8;
constexpr int kVectors = 2;  // of sums, for a row of x and a panel
constexpr int64_t kPairBytes = kVectors * 32;
static_assert(kFixedColumns == kVectors * kLanes && kFewFixedColumns == kLanes, "lanes are weight rows");

static_assert(((int64_t{1} << kFixedBits4) - 1) * kLargestFixedWeight * kFixedGroup <= INT32_MAX, "exact sums");
static_assert(2 * 128 * static_cast<int>(kFp4Int8Unit) <= INT16_MAX && kNf4Int8Unit <= kFp4Int8Unit, "exact pairs");
static_assert(((int64_t{1} << kFixedBits8) - 1) * 128 * kFixedGroup <= INT32_MAX && kFixedBits8 < 16, "exact sums");

HB_INLINE __m256i load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

HB_INLINE void store(__m256i values, char* to) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), values);
}

// Sixteen bytes of eight rows, of rows i and i + 4 in rows[i] -> units of two bytes, eight rows of a unit, then of the
// next one, two units in units[i].
HB_INLINE void interleave(const __m256i (&rows)[4], __m256i (&units)[4]) {
    const __m256i a = _mm256_unpacklo_epi16(rows[0], rows[2]), b = _mm256_unpacklo_epi16(rows[1], rows[3]);
    const __m256i c = _mm256_unpackhi_epi16(rows[0], rows[2]), d = _mm256_unpackhi_epi16(rows[1], rows[3]);
    units[0] = _mm256_unpacklo_epi16(a, b), units[1] = _mm256_unpackhi_epi16(a, b);
    units[2] = _mm256_unpacklo_epi16(c, d), units[3] = _mm256_unpackhi_epi16(c, d);
}

// sum += term, here and in place: left to itself, GCC 12 keeps terms on the stack and adds them up at the end, or
// copies each sum once more.
HB_INLINE void add_to(__m256i& sum, __m256i term) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term));
}

// A group of a weight row in 16-bit integers, and its products with a row of x, in eight sums.
using Group = __m256i[4];
HB_INLINE __m256i multiply_group(const int16_t* x, const Group& weights) {
    __m256i sum = _mm256_madd_epi16(load(x), weights[0]);
    for (int i = 1; i < 4; ++i) add_to(sum, _mm256_madd_epi16(load(x + 16 * i), weights[i]));
    return sum;
}

// How each kind of weight goes from codes to integers, and what few rows of x make of a group of them.
struct FourBits {
    static constexpr bool kFuses = true;
    static constexpr int64_t kGroupBytes = kFixedGroup / 2;
    using Few = Group;

    __m256i low, high;  // bytes of the table's entries

    HB_INLINE explicit FourBits(const DecodedWeight& weight)
        : FourBits(load((weight.format == HB_NF4 ? kNf4Fixed : kFp4Fixed).at)) {}
    HB_INLINE explicit FourBits(__m256i entries) {
        const __m256i byte = _mm256_set1_epi16(255);
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
    HB_INLINE void decode(const uint8_t* codes, Few& values) const {
        const __m256i bytes = load(codes), nibble = _mm256_set1_epi8(15);
        look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), values[0], values[1]);
        look_up(_mm256_and_si256(bytes, nibble), values[2], values[3]);
    }
    static HB_INLINE __m256i multiply(const int16_t* x, const Few& weights) { return multiply_group(x, weights); }

    // Sixteen bytes of eight rows, of rows i and i + 4 in rows[i] -> their pairs, one behind the other. Two bytes have
    // a pair of even columns and one of odd ones.
    HB_INLINE void decode_columns(const __m256i (&rows)[4], char* pairs) const {
        __m256i units[4];
        interleave(rows, units);
        for (const __m256i& two : units) {
            const __m256i nibble = _mm256_set1_epi8(15);
            __m256i even[2], odd[2];
            look_up(_mm256_and_si256(_mm256_srli_epi16(two, 4), nibble), even[0], even[1]);
            look_up(_mm256_and_si256(two, nibble), odd[0], odd[1]);
            for (int i = 0; i < 2; ++i, pairs += 2 * kPairBytes) {
                store(even[i], pairs);
                store(odd[i], pairs + kPairBytes);
            }
        }
    }
    static float unit(const DecodedWeight& weight) { return weight.format == HB_NF4 ? kNf4FixedUnit : kFp4FixedUnit; }
};

// For x in int8, whose scales have the table's unit. Few rows of x meet entries of one byte: magnitudes of x times
// entries with its signs, of which two products fit into 16 bits.
struct FourBitsInInt8 : FourBits {
    static constexpr bool kFuses = false;
    using Few = __m256i[2];  // of even columns and of odd ones

    __m256i entries;

    HB_INLINE explicit FourBitsInInt8(const DecodedWeight& weight)
        : FourBitsInInt8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(int8_table(weight.format).at))) {}
    HB_INLINE explicit FourBitsInInt8(__m128i table)
        : FourBits(_mm256_cvtepi8_epi16(table)), entries(_mm256_broadcastsi128_si256(table)) {}

    HB_INLINE void decode(const uint8_t* codes, Few& values) const {
        const __m256i bytes = load(codes), nibble = _mm256_set1_epi8(15);
        values[0] = _mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
        values[1] = _mm256_shuffle_epi8(entries, _mm256_and_si256(bytes, nibble));
    }
    static HB_INLINE __m256i multiply(const int16_t* x, const Few& weights) {
        const int8_t* const bytes = reinterpret_cast<const int8_t*>(x);
        __m256i sums[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i magnitudes = load(bytes + kFixedGroup + 32 * i), values = load(bytes + 32 * i);
            const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(weights[i], values));
            sums[i] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        }
        add_to(sums[0], sums[1]);
        return sums[0];
    }
    static float unit(const DecodedWeight&) { return 1.0f; }
};

struct EightBits {
    static constexpr bool kFuses = true;
    static constexpr int64_t kGroupBytes = kFixedGroup;
    using Few = Group;

    static HB_INLINE void decode(const uint8_t* codes, Few& values) {
        for (int i = 0; i < 4; ++i) {
            values[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
        }
    }
    static HB_INLINE __m256i multiply(const int16_t* x, const Few& weights) { return multiply_group(x, weights); }
    static HB_INLINE void decode_columns(const __m256i (&rows)[4], char* pairs) {
        __m256i units[4];
        interleave(rows, units);
        for (const __m256i& two : units) {
            store(_mm256_srai_epi16(_mm256_unpacklo_epi8(two, two), 8), pairs);
            store(_mm256_srai_epi16(_mm256_unpackhi_epi8(two, two), 8), pairs + kPairBytes);
            pairs += 2 * kPairBytes;
        }
    }
    static float unit(const DecodedWeight&) { return kInt8Max; }
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

}  // namespace

}  // namespace hb
