// What the tensor-core kernels of the 4-bit matmul share: reading scales. No entry.
#pragma once

#include "float_sums.cuh"
#include "linear4_mma.h"

namespace hb {

constexpr int kCodeRowBytes = kStageValues / 2;

inline int log2_of(int64_t value) {
    int shift = 0;
    while (shift < 62 && (int64_t{1} << shift) < value) ++shift;
    return (int64_t{1} << shift) == value ? shift : -1;
}

// The pairs of weights that the 256 bytes of codes stand for, without their scale, lifted, as they go into a product:
// in shared memory, a copy for each lane.
constexpr int kPairBytes = kWarp * 4;  // of an entry's copies
constexpr int kPairTableBytes = 256 * kPairBytes;

// Of the block's first Warps warps, which write four entries at once, each lane a quarter of one's copies.
template <typename T, int Warps>
__device__ void fill_pairs(unsigned char* table, int64_t format, float lift) {
    constexpr int entries = kPieceBytes * kWarp / kPairBytes;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / kWarp; i < 256 / entries; i += Warps) {
        const int byte = i * entries + lane() / (kPairBytes / kPieceBytes);
        const unsigned pair =
            pair_of<T>(__fmul_rn(code_value(format, byte >> 4), lift), __fmul_rn(code_value(format, byte & 15), lift));
        const uint4 four = {pair, pair, pair, pair};
        *reinterpret_cast<uint4*>(table + (i * kWarp + lane()) * kPieceBytes) = four;
    }
}

// The pair of byte `which` of a word of codes; `own`: where the lane's copy is in an entry.
__device__ inline unsigned pair_at(const unsigned char* table, unsigned word, int which, unsigned own) {
    constexpr unsigned entries = 255u * kPairBytes;
    const unsigned place = which == 0 ? word << 7 : word >> (which * 8 - 7);
    return *reinterpret_cast<const unsigned*>(table + ((place & entries) | own));
}

// Where absmax is, and how to find one: blocks of either level have a power of two of what they scale.
struct Scales {
    Absmax absmax;
    int block_shift;   // log2 of the block size
    int nested_shift;  // and of the second level's, if there is one

    Scales() = default;
    template <typename Args>
    explicit Scales(const Args& a)
        : absmax{a.absmax, a.nested_absmax, a.offset, a.nested_blocksize},
          block_shift(log2_of(a.blocksize)),
          nested_shift(a.nested_absmax == nullptr ? 0 : log2_of(a.nested_blocksize)) {}
};

// An absmax as it is stored: itself, or a code and what scales its block of codes.
struct StoredScale {
    float value;
    int code;
};

// Where `Scaled` columns begin, or the last of K where these are not there.
template <int Scaled>
__device__ unsigned columns_at(int wanted, int64_t K) {
    const int last = static_cast<int>(K) - Scaled;
    return static_cast<unsigned>(wanted < last ? wanted : last);
}

// The scales of a tile of W, read in two steps, so that a kernel can do something else while the first is under way.
// Weights are counted from the tile's first one on, in 32 bits: all that needs 64 is worked out once.
class TileScales {
    const void* absmax_;   // of the block that the tile begins in
    const float* nested_;  // of the second level's block that this one is in; null: there is none
    float offset_;
    unsigned first_;         // the tile's first weight in its block
    unsigned nested_first_;  // that block in the second level's
    int block_shift_, nested_shift_;

  public:
    // Of a tile that begins with weight `first` of the flattened W.
    __device__ TileScales(const Scales& scales, int64_t first)
        : nested_(nullptr),
          offset_(0),
          first_(static_cast<unsigned>(first & ((int64_t{1} << scales.block_shift) - 1))),
          nested_first_(0),
          block_shift_(scales.block_shift),
          nested_shift_(scales.nested_shift) {
        const int64_t block = first >> block_shift_;
        if (scales.absmax.nested_absmax == nullptr) {
            absmax_ = static_cast<const float*>(scales.absmax.absmax) + block;
        } else {
            absmax_ = static_cast<const uint8_t*>(scales.absmax.absmax) + block;
            nested_ = scales.absmax.nested_absmax + (block >> nested_shift_);
            nested_first_ = static_cast<unsigned>(block & ((int64_t{1} << nested_shift_) - 1));
            offset_ = *scales.absmax.offset;
        }
    }

    __device__ bool are_nested() const { return nested_ != nullptr; }

    // Of weight `index` of the tile.
    __device__ StoredScale stored(unsigned index) const {
        const unsigned block = (first_ + index) >> block_shift_;
        if (!are_nested()) return {static_cast<const float*>(absmax_)[block], 0};
        return {nested_[(nested_first_ + block) >> nested_shift_], static_cast<const uint8_t*>(absmax_)[block]};
    }
    __device__ float value(StoredScale scale, const float* map) const {
        return are_nested() ? __fadd_rn(__fmul_rn(map[scale.code], scale.value), offset_) : scale.value;
    }
};

}  // namespace hb
