// Rows of x in 16-bit fixed point, or in int8, for AVX2; fixed.h says what of. fixed_avx2.cpp multiplies them.
#include <immintrin.h>

#include "clones.h"
#include "fixed.h"
#include "floats.h"
#include "int8.h"
#include "linear4_int8.h"

namespace hb {

namespace {

constexpr int64_t kLanes = 8;
static_assert(kFixedGroup == kGroupValues, "x in int8 has the same groups");

HB_INLINE __m256i load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

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

// The same in int8, as linear4_int8.cpp has it; `step` is what the product with a code of the table stands for.
HB_INLINE float round_group_to_int8(const float* values, float step, __m256i (&out)[4]) {
    const float largest = largest_magnitude(values, kFixedGroup), factor = int8_factor(largest);
    int16_t codes[kFixedGroup];
    for (int64_t i = 0; i < kFixedGroup; ++i) codes[i] = nearest_int8(values[i] * factor);
    for (int i = 0; i < 4; ++i) out[i] = load(codes + 16 * i);
    return largest * step;
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

// As FourBitsInInt8 takes few rows: bytes, the even columns, then the odd ones; then the magnitudes of these.
HB_INLINE void part_bytes(__m256i (&values)[4]) {
    const __m256i evens_first = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8,
                                                 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    __m256i halves[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(values[2 * i], values[2 * i + 1]), 0xd8);
        halves[i] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, evens_first), 0xd8);
    }
    values[0] = _mm256_permute2x128_si256(halves[0], halves[1], 0x20);
    values[1] = _mm256_permute2x128_si256(halves[0], halves[1], 0x31);
    values[2] = _mm256_abs_epi8(values[0]), values[3] = _mm256_abs_epi8(values[1]);
}

// As FourBits::decode_columns does: of each four columns the even ones, then the odd ones.
HB_INLINE void cross_columns(__m256i (&values)[4]) {
    for (__m256i& some : values) some = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(some, 0xd8), 0xd8);
}

}  // namespace

void load_fixed_avx2(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end) {
    const FixedLayout layout(a, rows.count);
    const int bits = a.weight.is_int8 ? kFixedBits8 : kFixedBits4;
    const bool are_few = rows.count <= kFewFixedRows;
    for (int64_t row = begin; row < end; ++row) {
        int16_t* to = reinterpret_cast<int16_t*>(rows.x) + row * layout.stride;
        float* const scales = reinterpret_cast<float*>(rows.x + layout.scales) + row * layout.groups;
        for (int64_t group = 0; group < layout.groups; ++group, to += kFixedGroup) {
            float values[kFixedGroup];
            load_floats(a.x, a.x_dtype, (rows.first + row) * a.K + group * kFixedGroup, kFixedGroup, values);
            __m256i found[4];
            scales[group] = a.rounds_x ? round_group_to_int8(values, int8_step(a.weight.format), found)
                                       : round_group(values, bits, found);
            if (are_few && a.rounds_x) {
                part_bytes(found);
            } else if (are_few && !a.weight.is_int8) {
                part_columns(found);
            } else if (!a.weight.is_int8) {
                cross_columns(found);
            }
            for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), found[i]);
        }
    }
}

}  // namespace hb
