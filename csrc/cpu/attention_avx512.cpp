// The inner part of attention for CPUs with AVX-512; see attention.h for the layout and attention.cpp for the rest.
//
// Six query vectors meet 64 keys in 24 registers; the six rows of weights meet 64 values of an output likewise. The
// roof is the multiplier: per tile, 4 * padded_d + 4 * padded_e instructions for each vector, about 90 for its softmax.
// bfloat16 keys and values stay as they are at the level avx512_bf16, which multiplies their pairs, at twice the speed;
// weights are rounded to bfloat16 in either case, so the two give the same bits.
#include "attention.h"
#include "attention_softmax_avx512.h"
#include "halfbyte.h"
#include "level.h"

#ifdef HB_X86

#include <immintrin.h>

#define HB_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace hb::attention {

namespace {

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

template <typename Kind>
HB_AVX512 void attend(const Shape& shape, const float* keys, const float* values, const Block& block) {
    const Seen seen = seen_by(block);
    alignas(64) float rows[kBlockVectors][kTileKeys] = {};
    const int64_t depth = shape.padded_d / Kind::kWidth;
    // Lanes behind the last key that is seen are left out. Those in front may hold anything, and are masked.
    multiply_for<Kind>(block.vectors, (seen.end + kLanes - 1) / kLanes)(
        {rows[0], kTileKeys, reinterpret_cast<const float*>(block.queries),
         shape.vector_bytes / static_cast<int64_t>(sizeof(float)), keys, kTileKeys, 0, depth});
    for (int64_t vector = 0; vector < block.vectors; ++vector) {
        weigh<Kind::kWidth == 2>(shape, block, vector, rows[vector]);
    }
    // Weights outside are zero, and adding nothing changes no bit.
    const int64_t begin = seen.begin / 2 * 2 / Kind::kWidth, end = (seen.end + 1) / 2 * 2 / Kind::kWidth;
    for (int64_t e = 0; e < shape.padded_e; e += kTileKeys) {
        const int64_t left = (shape.padded_e - e) / kLanes;
        multiply_for<Kind>(block.vectors, left < kTileLanes ? left : kTileLanes)(
            {block.outputs + e, shape.padded_e, rows[0], kTileKeys, values + e, shape.padded_e, begin, end});
    }
}

}  // namespace

const Variant& fastest(int64_t dtype, int64_t store, int64_t D, int64_t E) {
    static constexpr Variant kFloats = {false,   kBlockVectors, pack_floats_avx512, attend<Floats>, nullptr, nullptr,
                                        nullptr, nullptr};
    static constexpr Variant kPairs = {true,    kBlockVectors, pack_pairs_avx512, attend<Pairs>,
                                       nullptr, nullptr,       nullptr,           nullptr};
    const bool are_pairs = dtype == HB_BFLOAT16 && D % 2 == 0 && (store == HB_BFLOAT16 || store == HB_INT8);
    if (are_pairs && level() >= kAmx && has_avx512() && fit_tiles(D, E)) return on_tiles();
    if (are_pairs && level() == kAvx512Bf16) return kPairs;
    return has_avx512() ? kFloats : baseline();
}

}  // namespace hb::attention

#else

namespace hb::attention {

const Variant& fastest(int64_t, int64_t, int64_t, int64_t) {
    return baseline();
}

}  // namespace hb::attention

#endif
