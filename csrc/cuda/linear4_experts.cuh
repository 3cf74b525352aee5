// Where the 4-bit matrices of experts lie: `matrices` of each side by side, in elements from one to the next but for
// the codes.
#pragma once

#include "experts.cuh"

namespace hb {

struct Experts4 {
    ExpertRows rows;
    int64_t matrices;
    int64_t packed_bytes;
    int64_t blocks;         // of a matrix's absmax
    int64_t nested_blocks;  // and of the second level

    explicit Experts4(const hb_linear4_experts_args& a)
        : rows{a.ends, a.E, a.M},
          matrices(a.P),
          packed_bytes(a.packed_bytes),
          blocks(ceil_div(a.N * a.K, a.blocksize)),
          nested_blocks(a.nested_absmax == nullptr ? 0 : ceil_div(blocks, a.nested_blocksize)) {}

    // The absmax of a matrix, counted over all experts.
    __device__ Absmax absmax_of(const Absmax& first, int64_t matrix) const {
        Absmax own = first;
        if (first.nested_absmax == nullptr) {
            own.absmax = static_cast<const float*>(first.absmax) + matrix * blocks;
        } else {
            own.absmax = static_cast<const uint8_t*>(first.absmax) + matrix * blocks;
            own.nested_absmax += matrix * nested_blocks;
            own.offset += matrix;
        }
        return own;
    }
};

}  // namespace hb
