// What the tensor-core kernels of the 4-bit matmul share: reading scales. No entry.
#pragma once

#include "float_sums.cuh"
#include "linear4_mma.h"

namespace hb {

constexpr int kCodeRowBytes = kStageValues / 2;

// In global memory: the lanes of a warp read it side by side, for which constant memory would take turns.
static __device__ const Table<float, 256> kMap = make_dynamic_values();

inline int log2_of(int64_t value) {
    int shift = 0;
    while (shift < 62 && (int64_t{1} << shift) < value) ++shift;
    return (int64_t{1} << shift) == value ? shift : -1;
}

// An absmax as it is stored: itself, or a code and what scales its block of codes.
struct StoredScale {
    float value;
    int code;
};

// Reads absmax in two steps, so that a kernel can do something else while the first is under way.
struct Scales {
    Absmax absmax;
    int block_shift;   // log2 of the block size
    int nested_shift;  // and of the second level's, or -1 where that is no power of two

    Scales() = default;
    template <typename Args>
    explicit Scales(const Args& a)
        : absmax{a.absmax, a.nested_absmax, a.offset, a.nested_blocksize},
          block_shift(log2_of(a.blocksize)),
          nested_shift(a.nested_absmax == nullptr ? -1 : log2_of(a.nested_blocksize)) {}

    // Of weight `index` of the flattened W.
    __device__ StoredScale stored(int64_t index) const {
        const int64_t block = index >> block_shift;
        if (absmax.nested_absmax == nullptr) return {static_cast<const float*>(absmax.absmax)[block], 0};
        const int64_t outer = nested_shift >= 0 ? block >> nested_shift : block / absmax.nested_blocksize;
        return {absmax.nested_absmax[outer], static_cast<const uint8_t*>(absmax.absmax)[block]};
    }
    __device__ float value(StoredScale scale, const float* map) const {
        if (absmax.nested_absmax == nullptr) return scale.value;
        return __fadd_rn(__fmul_rn(map[scale.code], scale.value), *absmax.offset);
    }
};

}  // namespace hb
