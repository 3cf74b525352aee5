// The inner part of attention for CPUs with AVX-512; see attention.h for the layout and attention.cpp for the rest.
//
// Six query vectors meet 64 keys in 24 registers; the six rows of weights meet 64 values of an output likewise. The
// roof is the multiplier: per tile, 4 * padded_d + 4 * padded_e instructions for each vector, about 90 for its softmax.
// bfloat16 keys and values stay as they are where the CPU multiplies their pairs (AVX512_BF16), at twice the speed;
// weights are rounded to bfloat16 in either case, so the two give the same bits.
#include "attention.h"
#include "checks.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>
#include <math.h>

#define HB_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace hb::attention {

namespace {

// --- packing --------------------------------------------------------------------------------------------------------

// 16 values of a row from `first` on, as 32-bit lanes: zeros beyond `count` and for a null row.
HB_AVX512 inline __m512i load_words(const char* row, int64_t first, int64_t count) {
    if (row == nullptr) return _mm512_setzero_si512();
    const __mmask16 there = static_cast<__mmask16>(count - first < kLanes ? (1 << (count - first)) - 1 : 0xffff);
    return _mm512_maskz_loadu_epi32(there, reinterpret_cast<const int32_t*>(row) + first);
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

// 16 rows of 16 lanes -> 16 columns.
HB_AVX512 inline void transpose(__m512i (&rows)[kLanes]) {
    __m512i pairs[kLanes], quads[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    // quads[4 * i + j] holds, in its 128-bit part k, column 4 * k + j of rows 4 * i .. 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// What the next tile will read where this one reads `row` now: one line per load, so that fetching keeps pace with
// work.
HB_AVX512 inline void fetch(const char* row, int64_t byte) {
    if (row != nullptr) _mm_prefetch(row + byte, _MM_HINT_T1);
}

// keys [depth, 64] from 64 rows of `count` lanes; `Load` reads 16 lanes of a row.
template <typename Load>
HB_AVX512 inline void pack_keys(const TileRows& rows, const TileRows& next, int64_t count, int64_t depth, Load load,
                                float* keys) {
    for (int64_t key = 0; key < kTileKeys; key += kLanes) {
        for (int64_t first = 0; first < count; first += kLanes) {
            __m512i lanes[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                lanes[i] = load(rows.key(key + i), first, count);
                fetch(next.key(key + i), first * Load::kBytes);
            }
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
    static constexpr int64_t kBytes = Dtype == HB_FLOAT32 ? 4 : 2;
    HB_AVX512 __m512i operator()(const char* row, int64_t first, int64_t count) const {
        return load_floats<Dtype>(row, first, count);
    }
};

struct LoadWords {
    static constexpr int64_t kBytes = 4;
    HB_AVX512 __m512i operator()(const char* row, int64_t first, int64_t count) const {
        return load_words(row, first, count);
    }
};

template <int64_t Dtype>
HB_AVX512 void pack_floats(const Shape& shape, const TileRows& rows, const TileRows& next, float* keys, float* values) {
    pack_keys(rows, next, shape.D, shape.padded_d, LoadFloats<Dtype>(), keys);
    for (int64_t key = 0; key < kTileKeys; ++key) {
        for (int64_t first = 0; first < shape.E; first += kLanes) {
            _mm512_storeu_si512(values + key * shape.padded_e + first,
                                load_floats<Dtype>(rows.value(key), first, shape.E));
            fetch(next.value(key), first * LoadFloats<Dtype>::kBytes);
        }
    }
}

HB_AVX512 void pack_any(const Shape& shape, const TileRows& rows, const TileRows& next, float* keys, float* values) {
    switch (shape.dtype) {
        case HB_FLOAT32:
            return pack_floats<HB_FLOAT32>(shape, rows, next, keys, values);
        case HB_FLOAT16:
            return pack_floats<HB_FLOAT16>(shape, rows, next, keys, values);
        default:
            return pack_floats<HB_BFLOAT16>(shape, rows, next, keys, values);
    }
}

// Pairs of d become one lane of keys, pairs of keys one lane of values.
HB_AVX512 void pack_pairs(const Shape& shape, const TileRows& rows, const TileRows& next, float* keys, float* values) {
    pack_keys(rows, next, shape.D / 2, shape.D / 2, LoadWords(), keys);
    for (int64_t key = 0; key < kTileKeys; key += 2) {
        for (int64_t first = 0; first < shape.E; first += kLanes) {
            const __m512i even = _mm512_cvtepu16_epi32(load_shorts(rows.value(key), first, shape.E));
            const __m512i odd = _mm512_cvtepu16_epi32(load_shorts(rows.value(key + 1), first, shape.E));
            _mm512_storeu_si512(values + key / 2 * shape.padded_e + first,
                                _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            fetch(next.value(key), first * 2);
            fetch(next.value(key + 1), first * 2);
        }
    }
}

// --- products -------------------------------------------------------------------------------------------------------

// sums[i][n] += x[i][k] * y[k][n] for k from begin to end, in 32-bit lanes; strides in lanes.
struct Operands {
    float* sums;
    int64_t sums_stride;
    const float* x;
    int64_t x_stride;
    const float* y;
    int64_t y_stride;
    int64_t begin, end;
};

struct Floats {
    static constexpr int64_t kWidth = 1;  // values in a lane

    template <int Vectors, int Lanes>
    HB_AVX512 static void multiply(const Operands& o) {
        __m512 sums[Vectors][Lanes];
        for (int i = 0; i < Vectors; ++i) {
            for (int j = 0; j < Lanes; ++j) sums[i][j] = _mm512_loadu_ps(o.sums + i * o.sums_stride + j * kLanes);
        }
        for (int64_t pair = o.begin; pair < o.end; pair += 2) {
            for (int64_t k = pair + 1; k >= pair; --k) {
                __m512 y[Lanes];
                for (int j = 0; j < Lanes; ++j) y[j] = _mm512_loadu_ps(o.y + k * o.y_stride + j * kLanes);
                for (int i = 0; i < Vectors; ++i) {
                    const __m512 x = _mm512_set1_ps(o.x[i * o.x_stride + k]);
                    for (int j = 0; j < Lanes; ++j) sums[i][j] = _mm512_fmadd_ps(x, y[j], sums[i][j]);
                }
            }
        }
        for (int i = 0; i < Vectors; ++i) {
            for (int j = 0; j < Lanes; ++j) _mm512_storeu_ps(o.sums + i * o.sums_stride + j * kLanes, sums[i][j]);
        }
    }
};

struct Pairs {
    static constexpr int64_t kWidth = 2;

    template <int Vectors, int Lanes>
    HB_AVX512_BF16 static void multiply(const Operands& o) {
        __m512 sums[Vectors][Lanes];
        for (int i = 0; i < Vectors; ++i) {
            for (int j = 0; j < Lanes; ++j) sums[i][j] = _mm512_loadu_ps(o.sums + i * o.sums_stride + j * kLanes);
        }
        for (int64_t k = o.begin; k < o.end; ++k) {
            __m512bh y[Lanes];
            for (int j = 0; j < Lanes; ++j) {
                y[j] = reinterpret_cast<__m512bh>(_mm512_loadu_ps(o.y + k * o.y_stride + j * kLanes));
            }
            for (int i = 0; i < Vectors; ++i) {
                const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_ps(o.x[i * o.x_stride + k]));
                for (int j = 0; j < Lanes; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], x, y[j]);
            }
        }
        for (int i = 0; i < Vectors; ++i) {
            for (int j = 0; j < Lanes; ++j) _mm512_storeu_ps(o.sums + i * o.sums_stride + j * kLanes, sums[i][j]);
        }
    }
};

using Multiply = void (*)(const Operands&);

template <typename Kind, int Vectors>
struct ByLanes {
    static constexpr Multiply at[kTileLanes] = {
        Kind::template multiply<Vectors, 1>, Kind::template multiply<Vectors, 2>, Kind::template multiply<Vectors, 3>,
        Kind::template multiply<Vectors, 4>};
};

template <typename Kind>
Multiply multiply_for(int64_t vectors, int64_t lanes) {
    static constexpr const Multiply* kByVectors[kBlockVectors] = {ByLanes<Kind, 1>::at, ByLanes<Kind, 2>::at,
                                                                  ByLanes<Kind, 3>::at, ByLanes<Kind, 4>::at,
                                                                  ByLanes<Kind, 5>::at, ByLanes<Kind, 6>::at};
    return kByVectors[vectors - 1][lanes - 1];
}

// --- softmax
// ----------------------------------------------------------------------------------------------------------

// 2^x = 2^n * (1 + r * q), n an integer.
struct Power {
    __m512 n, r, q;
};

HB_AVX512 inline Power split_power(__m512 x) {
    const __m512 magic = _mm512_set1_ps(kRoundToInteger);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 q = _mm512_set1_ps(kExp2[5]);
    for (int i = 4; i >= 0; --i) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExp2[i]));
    return {n, r, q};
}

// 2^x for x <= 0, NaN for NaN; zero where a normal float would end.
HB_AVX512 inline __m512 exp2_of(__m512 x) {
    const Power power = split_power(x);
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallestPower), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(kept, _mm512_fmadd_ps(power.q, power.r, _mm512_set1_ps(1.0f)), power.n);
}

// cap * tanh(x / (2 log2 e)), from 2^x - 1, which keeps its digits near zero.
HB_AVX512 inline __m512 cap_of(__m512 x, float cap) {
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(kTanhIsOne), _mm512_abs_ps(x));
    const Power power = split_power(size);
    const __m512 scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), power.n);
    const __m512 fraction = _mm512_mul_ps(power.q, power.r);
    const __m512 less_one = _mm512_fmadd_ps(scale, fraction, _mm512_sub_ps(scale, _mm512_set1_ps(1.0f)));
    const __m512 tanh = _mm512_div_ps(less_one, _mm512_add_ps(less_one, _mm512_set1_ps(2.0f)));
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
    const __m512 capped = _mm512_mul_ps(tanh, _mm512_set1_ps(cap));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(capped), sign));
}

// To nearest, ties to even, still as float32. A NaN that comes from bfloat16 values stays one.
HB_AVX512 inline __m512i round_to_bfloat(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
}

// A larger maximum: what was summed up so far shrinks.
HB_AVX512 inline void rescale(const Shape& shape, const Block& block, int64_t vector, float maximum) {
    const __m512 factor = exp2_of(_mm512_set1_ps(block.maxima[vector] - maximum));
    float* const sums = block.sums + vector * kLanes;
    _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), factor));
    float* const outputs = block.outputs + vector * shape.padded_e;
    for (int64_t e = 0; e < shape.padded_e; e += kLanes) {
        _mm512_storeu_ps(outputs + e, _mm512_mul_ps(_mm512_loadu_ps(outputs + e), factor));
    }
    block.maxima[vector] = maximum;
}

// Sums of products -> weights against the running maximum, in place; as bfloat16 in the first half if `Kind` is Pairs.
template <typename Kind>
HB_AVX512 void weigh(const Shape& shape, const Block& block, int64_t vector, float* row) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i begin = _mm512_set1_epi32(static_cast<int32_t>(block.begin[vector]));
    const __m512i end = _mm512_set1_epi32(static_cast<int32_t>(block.end[vector]));
    __m512 scores[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        scores[j] = _mm512_mul_ps(_mm512_loadu_ps(row + j * kLanes), _mm512_set1_ps(shape.scale));
        if (shape.is_capped) scores[j] = cap_of(scores[j], shape.cap);
        const __m512i place = _mm512_add_epi32(places, _mm512_set1_epi32(static_cast<int32_t>(j * kLanes)));
        const __mmask16 seen = _mm512_cmpge_epi32_mask(place, begin) & _mm512_cmplt_epi32_mask(place, end);
        scores[j] = _mm512_mask_mov_ps(nothing, seen, scores[j]);
    }
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3])));
    if (!(largest <= block.maxima[vector])) rescale(shape, block, vector, largest);
    // A vector that has seen nothing yet keeps -inf, against which no difference has a meaning.
    const float maximum = block.maxima[vector] == -INFINITY ? 0.0f : block.maxima[vector];
    __m512 weights[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        weights[j] = exp2_of(_mm512_sub_ps(scores[j], _mm512_set1_ps(maximum)));
        if (shape.dtype == HB_BFLOAT16) weights[j] = _mm512_castsi512_ps(round_to_bfloat(weights[j]));
        if (Kind::kWidth == 2) {
            const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(weights[j]), 16);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j * kLanes / 2), _mm512_cvtepi32_epi16(high));
        } else {
            _mm512_storeu_ps(row + j * kLanes, weights[j]);
        }
    }
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(weights[0], weights[1]), _mm512_add_ps(weights[2], weights[3]));
    float* const sums = block.sums + vector * kLanes;
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum));
}

template <typename Kind>
HB_AVX512 void attend(const Shape& shape, const float* keys, const float* values, const Block& block) {
    alignas(64) float rows[kBlockVectors][kTileKeys] = {};
    const int64_t depth = shape.padded_d / Kind::kWidth;
    multiply_for<Kind>(block.vectors, kTileLanes)({rows[0], kTileKeys, reinterpret_cast<const float*>(block.queries),
                                                   shape.vector_bytes / static_cast<int64_t>(sizeof(float)), keys,
                                                   kTileKeys, 0, depth});
    int64_t begin = kTileKeys, end = 0;
    for (int64_t vector = 0; vector < block.vectors; ++vector) {
        weigh<Kind>(shape, block, vector, rows[vector]);
        begin = block.begin[vector] < begin ? block.begin[vector] : begin;
        end = block.end[vector] > end ? block.end[vector] : end;
    }
    // Weights outside are zero, and adding nothing changes no bit.
    begin = begin / 2 * 2 / Kind::kWidth, end = (end + 1) / 2 * 2 / Kind::kWidth;
    for (int64_t e = 0; e < shape.padded_e; e += kTileKeys) {
        const int64_t left = (shape.padded_e - e) / kLanes;
        multiply_for<Kind>(block.vectors, left < kTileLanes ? left : kTileLanes)(
            {block.outputs + e, shape.padded_e, rows[0], kTileKeys, values + e, shape.padded_e, begin, end});
    }
}

bool has_bfloat_products() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

}  // namespace

const Variant& fastest(int64_t dtype, int64_t D) {
    static constexpr Variant kFloats = {false, pack_any, attend<Floats>};
    static constexpr Variant kPairs = {true, pack_pairs, attend<Pairs>};
    if (dtype == HB_BFLOAT16 && D % 2 == 0 && has_bfloat_products()) return kPairs;
    return has_avx512() ? kFloats : baseline();
}

}  // namespace hb::attention

#else

namespace hb::attention {

const Variant& fastest(int64_t, int64_t) {
    return baseline();
}

}  // namespace hb::attention

#endif
