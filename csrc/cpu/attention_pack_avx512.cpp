// Packing a tile of keys and values for attention_avx512.cpp and attention_amx.cpp: keys transposed in registers,
// sixteen by sixteen, values widened or paired, the next tile fetched meanwhile. See attention.h for what comes out.
// Codes in int8 are transposed four to a lane and widened then, which takes half of what transposing pairs does.
#include <string.h>

#include "attention.h"
#include "halfbyte.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>

#include "vectors_avx512.h"

namespace hb::attention {

namespace {

// 16 values of a row from `first` on, as 32-bit lanes: zeros beyond `count` and for a null row.
HB_AVX512 inline __m512i load_words(const char* row, int64_t first, int64_t count) {
    if (row == nullptr) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi32(lanes_mask(count - first), reinterpret_cast<const int32_t*>(row) + first);
}

HB_AVX512 inline __m256i load_shorts(const char* row, int64_t first, int64_t count) {
    if (row == nullptr) return _mm256_setzero_si256();
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(row) + first;
    if (count - first >= kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    alignas(32) uint16_t last[kLanes] = {};
    memcpy(last, from, static_cast<size_t>(count - first) * sizeof(uint16_t));
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(last));
}

template <int64_t Dtype>
HB_AVX512 inline __m512i load_floats(const char* row, int64_t first, int64_t count) {
    if (Dtype == HB_FLOAT32) return load_words(row, first, count);
    const __m256i shorts = load_shorts(row, first, count);
    if (Dtype == HB_FLOAT16) return _mm512_castps_si512(_mm512_cvtph_ps(shorts));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16);
}

// Whether sixteen positions from `first` on are all not to be read.
inline bool are_unread(const TileRows& rows, int64_t first) {
    for (int64_t i = first; i < first + kLanes; ++i) {
        if (rows.keys[i] != nullptr) return false;
    }
    return true;
}

// keys [depth, 64] from 64 rows of `count` lanes; `Load` reads 16 lanes of a row.
template <typename Load>
HB_AVX512 inline void pack_keys(const TileRows& rows, Fetching& next, int64_t count, int64_t depth, Load load,
                                float* keys) {
    for (int64_t key = 0; key < kTileKeys; key += kLanes) {
        if (are_unread(rows, key)) continue;
        for (int64_t first = 0; first < count; first += kLanes) {
            __m512i lanes[kLanes];
            for (int i = 0; i < kLanes; ++i) lanes[i] = load(rows.key(key + i), first, count);
            next.step();
            transpose(lanes);
            for (int i = 0; i < kLanes && first + i < depth; ++i) {
                _mm512_storeu_si512(keys + (first + i) * kTileKeys + key, lanes[i]);
            }
        }
        // An odd size has one lane more than it has values, unless the last sixteen held it.
        if (depth > count && count % kLanes == 0) {
            _mm512_storeu_si512(keys + count * kTileKeys + key, _mm512_setzero_si512());
        }
    }
}

template <int64_t Dtype>
struct LoadFloats {
    HB_AVX512 __m512i operator()(const char* row, int64_t first, int64_t count) const {
        return load_floats<Dtype>(row, first, count);
    }
};

struct LoadWords {
    HB_AVX512 __m512i operator()(const char* row, int64_t first, int64_t count) const {
        return load_words(row, first, count);
    }
};

template <int64_t Dtype>
HB_AVX512 void pack_floats(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values) {
    pack_keys(rows, next, shape.D, shape.padded_d, LoadFloats<Dtype>(), keys);
    for (int64_t group = 0; group < kTileKeys; group += kLanes) {
        if (are_unread(rows, group)) continue;
        for (int64_t key = group; key < group + kLanes; ++key) {
            if (key % 2 == 0) next.step();
            for (int64_t first = 0; first < shape.E; first += kLanes) {
                _mm512_storeu_si512(values + key * shape.padded_e + first,
                                    load_floats<Dtype>(rows.value(key), first, shape.E));
            }
        }
    }
}

// --- int8 -----------------------------------------------------------------------------------------------------------

// 64 codes of a row from `first` on, zeros beyond `count` and for a null row.
HB_AVX512BW inline __m512i load_codes(const char* row, int64_t first, int64_t count) {
    if (row == nullptr) return _mm512_setzero_si512();
    const __mmask64 there = count - first < 64 ? (uint64_t{1} << (count - first)) - 1 : ~uint64_t{0};
    return _mm512_maskz_loadu_epi8(there, row + first);
}

// Code `Which` of each lane's four.
template <int Which>
HB_AVX512BW inline __m512 widen(__m512i lanes) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(lanes, 24 - 8 * Which), 24));
}

// Two codes a lane as bfloat16, which holds them in its upper bits: the first below.
HB_AVX512BW inline __m512i pair_up(__m512 first, __m512 second) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
}

struct ToFloats {
    static constexpr int64_t kWidth = 1;
    HB_AVX512BW static void expand(__m512i lanes, __m512i* out) {
        out[0] = _mm512_castps_si512(widen<0>(lanes)), out[1] = _mm512_castps_si512(widen<1>(lanes));
        out[2] = _mm512_castps_si512(widen<2>(lanes)), out[3] = _mm512_castps_si512(widen<3>(lanes));
    }
};

struct ToPairs {
    static constexpr int64_t kWidth = 2;
    HB_AVX512BW static void expand(__m512i lanes, __m512i* out) {
        out[0] = pair_up(widen<0>(lanes), widen<1>(lanes)), out[1] = pair_up(widen<2>(lanes), widen<3>(lanes));
    }
};

template <typename To>
HB_AVX512BW void pack_key_codes(const Shape& shape, const TileRows& rows, Fetching& next, float* keys) {
    constexpr int64_t kOut = 4 / To::kWidth;  // lanes that four codes become
    const int64_t depth = shape.padded_d / To::kWidth;
    for (int64_t key = 0; key < kTileKeys; key += kLanes) {
        if (are_unread(rows, key)) continue;
        for (int64_t first = 0; first < shape.D; first += 4 * kLanes) {
            __m512i lanes[kLanes];
            for (int i = 0; i < kLanes; ++i) lanes[i] = load_codes(rows.key(key + i), first, shape.D);
            next.step();
            transpose(lanes);
            for (int64_t i = 0; i < kLanes && first + i * 4 < shape.padded_d; ++i) {
                __m512i out[kOut];
                To::expand(lanes[i], out);
                const int64_t at = (first + i * 4) / To::kWidth;
                for (int64_t j = 0; j < kOut && at + j < depth; ++j) {
                    _mm512_storeu_si512(keys + (at + j) * kTileKeys + key, out[j]);
                }
            }
        }
    }
}

// 16 codes of a value from `first` on.
HB_AVX512BW inline __m512 load_value(const char* row, int64_t first, int64_t count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm512_castsi512_si128(load_codes(row, first, count - first < kLanes ? count : first + kLanes))));
}

HB_AVX512BW void pack_value_codes(const Shape& shape, const TileRows& rows, Fetching& next, float* values) {
    for (int64_t key = 0; key < kTileKeys; ++key) {
        if (key % 2 == 0) next.step();
        for (int64_t first = 0; first < shape.E; first += kLanes) {
            _mm512_storeu_ps(values + key * shape.padded_e + first, load_value(rows.value(key), first, shape.E));
        }
    }
}

HB_AVX512BW void pack_value_code_pairs(const Shape& shape, const TileRows& rows, Fetching& next, float* values) {
    for (int64_t key = 0; key < kTileKeys; key += 2) {
        next.step();
        for (int64_t first = 0; first < shape.E; first += kLanes) {
            const __m512 even = load_value(rows.value(key), first, shape.E);
            const __m512 odd = load_value(rows.value(key + 1), first, shape.E);
            _mm512_storeu_si512(values + key / 2 * shape.padded_e + first, pair_up(even, odd));
        }
    }
}

}  // namespace

HB_AVX512 void pack_floats_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* keys,
                                  float* values) {
    switch (shape.store) {
        case HB_INT8:
            pack_key_codes<ToFloats>(shape, rows, next, keys);
            return pack_value_codes(shape, rows, next, values);
        case HB_FLOAT32:
            return pack_floats<HB_FLOAT32>(shape, rows, next, keys, values);
        case HB_FLOAT16:
            return pack_floats<HB_FLOAT16>(shape, rows, next, keys, values);
        default:
            return pack_floats<HB_BFLOAT16>(shape, rows, next, keys, values);
    }
}

// Pairs of d become one lane of keys, pairs of keys one lane of values.
HB_AVX512 void pack_pairs_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values) {
    if (shape.store == HB_INT8) {
        pack_key_codes<ToPairs>(shape, rows, next, keys);
        return pack_value_code_pairs(shape, rows, next, values);
    }
    pack_keys(rows, next, shape.D / 2, shape.D / 2, LoadWords(), keys);
    pack_value_pairs_avx512(shape, rows, next, values);
}

HB_AVX512 void pack_value_pairs_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* values) {
    for (int64_t key = 0; key < kTileKeys; key += 2) {
        next.step();
        for (int64_t first = 0; first < shape.E; first += kLanes) {
            const __m512i even = _mm512_cvtepu16_epi32(load_shorts(rows.value(key), first, shape.E));
            const __m512i odd = _mm512_cvtepu16_epi32(load_shorts(rows.value(key + 1), first, shape.E));
            _mm512_storeu_si512(values + key / 2 * shape.padded_e + first,
                                _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

}  // namespace hb::attention

#endif
