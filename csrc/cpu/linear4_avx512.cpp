// The 4-bit matmul for few rows of x: decoded values stay in registers. For CPUs with AVX-512; see linear4.cpp.
//
// Eight bytes hold sixteen values. Each byte goes into a 64-bit lane, its high nibble (the first value) to the lower
// half and its low nibble to the upper one, so that one table lookup gives the sixteen in order:
//
//     byte      b0               b1
//     lane      [hi b0][lo b0]   [hi b1][lo b1] ...      vpermps looks at the low four bits of each 32-bit index
//
// Four weight rows run together, because one sum is a chain of dependent additions. The roof is memory: 0.5625 bytes a
// weight, about five instructions for sixteen of them.
#include "level.h"
#include "linear4.h"

#ifdef HB_X86

#include <immintrin.h>

namespace hb {

namespace {

// Weight bytes are read once and in order; the distance covers a memory access at full speed.
constexpr int64_t kPrefetchBytes = 4096;

HB_AVX512 inline __m512 decode16(const uint8_t* bytes, __m512 table) {
    const __m512i lanes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(lanes, 4), _mm512_slli_epi64(lanes, 32));
    return _mm512_permutexvar_ps(codes, table);
}

HB_AVX512 inline float add_lanes(__m512 lanes) {
    alignas(64) float sums[kLanes];
    _mm512_store_ps(sums, lanes);
    return hb::add_lanes(sums);
}

template <int Rows>
HB_AVX512 void multiply(const float* x, int64_t padded_k, const FusedRows& weight, float (*sums)[kWeightRows]) {
    alignas(64) float values[kLanes];
    for (int64_t code = 0; code < kLanes; ++code) values[code] = weight.table->pairs[code][1];
    const __m512 table = _mm512_load_ps(values);

    __m512 totals[Rows][kWeightRows];
    for (int row = 0; row < Rows; ++row) {
        for (int64_t n = 0; n < kWeightRows; ++n) totals[row][n] = _mm512_setzero_ps();
    }
    const float* absmax[kWeightRows];
    int64_t left[kWeightRows];
    for (int64_t n = 0; n < kWeightRows; ++n) {
        absmax[n] = weight.absmax[n];
        left[n] = weight.left[n];
    }
    for (int64_t k = 0; k < weight.K;) {
        // As far as no row comes to the end of a block.
        int64_t run = weight.K - k;
        __m512 scale[kWeightRows];
        for (int64_t n = 0; n < kWeightRows; ++n) {
            run = left[n] < run ? left[n] : run;
            scale[n] = _mm512_set1_ps(*absmax[n]);
            _mm_prefetch(reinterpret_cast<const char*>(weight.packed[n] + k / 2) + kPrefetchBytes, _MM_HINT_T0);
        }
        for (const int64_t end = k + run; k < end; k += kLanes) {
            for (int64_t n = 0; n < kWeightRows; ++n) {
                const uint8_t* const bytes = weight.packed[n] + k / 2;
                const __m512 values16 = _mm512_mul_ps(decode16(bytes, table), scale[n]);
                for (int row = 0; row < Rows; ++row) {
                    const __m512 activations = _mm512_loadu_ps(x + row * padded_k + k);
                    totals[row][n] = _mm512_fmadd_ps(activations, values16, totals[row][n]);
                }
            }
        }
        for (int64_t n = 0; n < kWeightRows; ++n) {
            left[n] -= run;
            if (left[n] == 0) {
                left[n] = weight.blocksize;
                ++absmax[n];
            }
        }
    }
    for (int row = 0; row < Rows; ++row) {
        for (int64_t n = 0; n < kWeightRows; ++n) sums[row][n] = add_lanes(totals[row][n]);
    }
}

}  // namespace

bool can_fuse(int64_t K, int64_t blocksize) {
    return has_avx512() && K > 0 && K % kLanes == 0 && blocksize % kLanes == 0;
}

void multiply_fused(int64_t rows, const float* x, int64_t padded_k, const FusedRows& weight,
                    float (*sums)[kWeightRows]) {
    switch (rows) {
        case 1:
            return multiply<1>(x, padded_k, weight, sums);
        case 2:
            return multiply<2>(x, padded_k, weight, sums);
        case 3:
            return multiply<3>(x, padded_k, weight, sums);
        default:
            return multiply<4>(x, padded_k, weight, sums);
    }
}

}  // namespace hb

#else

namespace hb {

bool can_fuse(int64_t, int64_t) {
    return false;
}

void multiply_fused(int64_t, const float*, int64_t, const FusedRows&, float (*)[kWeightRows]) {}

}  // namespace hb

#endif
