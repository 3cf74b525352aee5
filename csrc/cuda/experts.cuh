// Rows of x that belong to experts, cut into tiles on the device: the host knows how many rows there are, not whose
// they are, and waits for nothing.
//
// Each expert's rows are cut by themselves, and so are the rows behind the last end, which are nobody's. There are as
// many thread blocks as the tiles could be at most; a block finds its tile from the ends, and leaves where there is
// none.
#pragma once

#include "vocabulary.cuh"

namespace hb {

// Which rows of x are whose.
struct ExpertRows {
    const int64_t* ends;  // [count]
    int64_t count;        // of experts
    int64_t M;            // rows of x

    // Where an expert's rows end, and nobody's (expert `count`); never outside of x, whatever the ends say.
    __device__ int64_t end(int64_t expert) const {
        if (expert < 0) return 0;
        const int64_t end = expert < count ? ends[expert] : M;
        return end < 0 ? 0 : (end < M ? end : M);
    }
    __device__ int64_t tiles(int64_t expert, int64_t tile_rows) const {
        const int64_t rows = end(expert) - end(expert - 1);
        return rows > 0 ? (rows + tile_rows - 1) / tile_rows : 0;
    }
};

struct ExpertTile {
    int64_t expert;  // ExpertRows::count: nobody
    int64_t first;   // row
    int64_t rows;    // 0: no such tile
};

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
__device__ inline ExpertTile find_expert_tile(const ExpertRows& experts, int64_t tile_rows, int64_t wanted) {
    const int64_t owners = experts.count + 1, share = (owners + kWarp - 1) / kWarp;
    const int64_t first = lane() * share, last = first + share < owners ? first + share : owners;
    int64_t tiles = 0;
    for (int64_t expert = first; expert < last; ++expert) tiles += experts.tiles(expert, tile_rows);
    int64_t left = wanted - sum_before(tiles);
    ExpertTile found = {0, 0, 0};
    for (int64_t expert = first; expert < last && left >= 0; ++expert) {
        const int64_t own = experts.tiles(expert, tile_rows);
        if (left < own) {
            const int64_t begin = experts.end(expert - 1) + left * tile_rows;
            const int64_t rows = experts.end(expert) - begin;
            found = {expert, begin, rows < tile_rows ? rows : tile_rows};
            break;
        }
        left -= own;
    }
    // One lane at most has found something: the sum is what it found.
    return {sum_in_warp(found.expert), sum_in_warp(found.first), sum_in_warp(found.rows)};
}

// Zeros for rows that are nobody's, by a whole block: `columns` of each from `to` on.
template <typename T>
__device__ void clear_rows(T* to, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t i = threadIdx.x; i < rows * columns; i += blockDim.x) {
        to[i / columns * stride + i % columns] = from_float<T>(0.0f);
    }
}

}  // namespace hb
