// The products of attention for AVX2: twelve sums of eight lanes in registers. The rest of its inner part is
// attention_baseline.cpp, in whose order every sum is added up.
#include <immintrin.h>

#include "attention.h"

namespace hb::attention {

namespace {

constexpr int64_t kWidth = 8;
static_assert(kLanes == 2 * kWidth, "columns are whole lanes");

// Two vectors of each of Vectors rows: sums[i][n] += x[i][k] * y[k][n] for k from begin to end, both even. A
// function of its own, so that its sums stay in registers.
template <int Vectors>
HB_NOINLINE void multiply_few(float* sums, int64_t sums_stride, const float* x, int64_t x_stride, const float* y,
                              int64_t y_stride, int64_t begin, int64_t end) {
    __m256 first[Vectors], second[Vectors];
    HB_UNROLL
    for (int i = 0; i < Vectors; ++i) {
        first[i] = _mm256_loadu_ps(sums + i * sums_stride);
        second[i] = _mm256_loadu_ps(sums + i * sums_stride + kWidth);
    }
    const auto add = [&](int64_t k) {
        const __m256 low = _mm256_loadu_ps(y + k * y_stride), high = _mm256_loadu_ps(y + k * y_stride + kWidth);
        HB_UNROLL
        for (int i = 0; i < Vectors; ++i) {
            const __m256 value = _mm256_broadcast_ss(x + i * x_stride + k);
            first[i] = _mm256_fmadd_ps(value, low, first[i]);
            second[i] = _mm256_fmadd_ps(value, high, second[i]);
        }
    };
    for (int64_t k = begin; k < end; k += 2) {
        add(k + 1);
        add(k);
    }
    HB_UNROLL
    for (int i = 0; i < Vectors; ++i) {
        _mm256_storeu_ps(sums + i * sums_stride, first[i]);
        _mm256_storeu_ps(sums + i * sums_stride + kWidth, second[i]);
    }
}

template <int Vectors = kBlockVectors>
HB_INLINE void multiply_vectors(int64_t vectors, float* sums, int64_t sums_stride, const float* x, int64_t x_stride,
                                const float* y, int64_t y_stride, int64_t begin, int64_t end) {
    if constexpr (Vectors > 1) {
        if (vectors < Vectors) {
            return multiply_vectors<Vectors - 1>(vectors, sums, sums_stride, x, x_stride, y, y_stride, begin, end);
        }
    }
    multiply_few<Vectors>(sums, sums_stride, x, x_stride, y, y_stride, begin, end);
}

}  // namespace

void multiply_avx2(int64_t vectors, int64_t columns, float* sums, int64_t sums_stride, const float* x, int64_t x_stride,
                   const float* y, int64_t y_stride, int64_t begin, int64_t end) {
    for (int64_t n = 0; n < columns; n += kLanes) {
        multiply_vectors(vectors, sums + n, sums_stride, x, x_stride, y + n, y_stride, begin, end);
    }
}

}  // namespace hb::attention
