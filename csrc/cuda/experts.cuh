// Rows of x that belong to experts, cut into tiles on the device: the host knows how many rows there are, not whose
// they are, and waits for nothing.
//
// Each expert's rows are cut by themselves, and so are the rows behind the last end, which are nobody's. There are as
// many thread blocks as the tiles could be at most; a block finds its tile from the ends, and leaves where there is
// none.
#pragma once

#include "vocabulary.cuh"

namespace hb {

// Where experts' matrices lie: `matrices` of each side by side, in elements from one to the next but for the codes.
struct Experts {
    const int64_t* ends;
    int64_t count;
    int64_t matrices;
    int64_t packed_bytes;
    int64_t blocks;         // of a matrix's absmax
    int64_t nested_blocks;  // and of the second level

    explicit Experts(const hb_linear4_experts_args& a)
        : ends(a.ends),
          count(a.E),
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

struct ExpertTile {
    int64_t expert;  // Experts::count: nobody
    int64_t first;   // row
    int64_t rows;    // 0: no such tile
};

// Where an expert's rows end, and nobody's; never outside of x, whatever the ends say.
__device__ inline int64_t end_of_rows(const Experts& experts, int64_t M, int64_t expert) {
    if (expert < 0) return 0;
    const int64_t end = expert < experts.count ? experts.ends[expert] : M;
    return end < 0 ? 0 : (end < M ? end : M);
}

__device__ inline int64_t tiles_of(const Experts& experts, int64_t M, int64_t expert, int64_t tile_rows) {
    const int64_t rows = end_of_rows(experts, M, expert) - end_of_rows(experts, M, expert - 1);
    return rows > 0 ? (rows + tile_rows - 1) / tile_rows : 0;
}

// The sum over the lanes before this one; `value` becomes that over all.
__device__ inline int64_t sum_before(int64_t& value) {
    int64_t before = 0;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int64_t other = __shfl_xor_sync(kAllLanes, value, distance);
        if ((lane() & distance) != 0) before += other;
        value += other;
    }
    return before;
}

// Tile number `wanted`, found by a whole warp: each lane counts the tiles of some neighbouring experts.
__device__ inline ExpertTile find_expert_tile(const Experts& experts, int64_t M, int64_t tile_rows, int64_t wanted) {
    const int64_t owners = experts.count + 1, share = (owners + kWarp - 1) / kWarp;
    const int64_t first = lane() * share, last = first + share < owners ? first + share : owners;
    int64_t tiles = 0;
    for (int64_t expert = first; expert < last; ++expert) tiles += tiles_of(experts, M, expert, tile_rows);
    int64_t left = wanted - sum_before(tiles);
    ExpertTile found = {0, 0, 0};
    for (int64_t expert = first; expert < last && left >= 0; ++expert) {
        const int64_t own = tiles_of(experts, M, expert, tile_rows);
        if (left < own) {
            const int64_t begin = end_of_rows(experts, M, expert - 1) + left * tile_rows;
            const int64_t rows = end_of_rows(experts, M, expert) - begin;
            found = {expert, begin, rows < tile_rows ? rows : tile_rows};
            break;
        }
        left -= own;
    }
    // One lane at most has found something: the sum is what it found.
    return {sum_in_warp(found.expert), sum_in_warp(found.first), sum_in_warp(found.rows)};
}

}  // namespace hb
