// The tile of the output that a thread block makes in LLM.int8(): what goes in, where it lies, and which of it is
// whose.
//
// Four warps share out the tile's rows of W, one or two its rows of x. W is the left operand of the tensor core, in 16
// rows; rows of x come in eights. With g = lane / 4 and t = lane % 4 a thread has, of each 16 by 8 outputs, those of
// rows g and g + 8 of W with rows 2t and 2t + 1 of x.
//
//     shared memory:  a ring of stages, and in its place at the end outliers | a word per warp
#pragma once

#include "linear8.h"
#include "tile_stages.cuh"

namespace hb {

struct Int8Product {
    Rows codes;  // of W
    Rows x;      // SplitRows' codes
    SplitRows rows;
    const void* values;  // x itself
    int64_t x_dtype;
    const float* absmax;
    int64_t M, N, K;
    const void* bias;
    int64_t bias_dtype;
    void* out;
    int* slices;    // [slices, M, N], or null: there is one, and it is finished at once
    int64_t* wide;  // [M, N] of experts, where a block adds up slices that an int32 does not hold together; or null
    int64_t slice_values;
    int64_t token_tiles;
    int64_t tiles;
};

constexpr int kWindow = kWarp * kWordColumns;  // columns whose outliers are listed at a time: a word for each lane
constexpr int kListed = 16;                    // of these, columns that are in shared memory together

template <int Number>
struct Int8Tile {
    static constexpr int kRows = kTilesOfInt8[Number].rows;
    static constexpr int kTokens = kTilesOfInt8[Number].tokens;
    static constexpr int kStageValues = kTilesOfInt8[Number].stage_values;
    static constexpr int kStages = kTilesOfInt8[Number].stages;
    static constexpr int kTokenWarps = kTilesOfInt8[Number].token_warps;
    static constexpr int kWarps = kWarpsPerBlock * kTokenWarps;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kWeightTiles = kRows / kWarpsPerBlock / 16;
    static constexpr int kTokenTiles = kTokens / kTokenWarps / 8;
    static constexpr int kStageBytes = (kRows + kTokens) * kStageValues;
    static constexpr int kRingBytes = kStages * kStageBytes;
    static constexpr int kOutlierBytes = (kWindow + 2 * kWarps * kWarp + kListed * (kRows + kTokens)) * 4;
    static constexpr int kRoomAt = kRingBytes > kOutlierBytes ? kRingBytes : kOutlierBytes;
    static constexpr int kSharedBytes = kRoomAt + kWarps * 4;
    // A thread's outputs.
    using Sums = int[kWeightTiles][kTokenTiles][4];
    using Totals = float[kWeightTiles][kTokenTiles][4];

    const Int8Product& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;

    __device__ Int8Tile(const Int8Product& product, int64_t row, int64_t token)
        : p(product), first_row(row), first_token(token), shared(shared_memory()) {}
    __device__ Int8Tile(const Int8Product& product, int64_t tile)
        : Int8Tile(product, tile / product.token_tiles * kRows, tile % product.token_tiles * kTokens) {}

    // This warp's first row of W and of x in the tile.
    __device__ static int warp_row() {
        return static_cast<int>(threadIdx.x) / kWarp % kWarpsPerBlock * 16 * kWeightTiles;
    }
    __device__ static int warp_token() {
        return static_cast<int>(threadIdx.x) / kWarp / kWarpsPerBlock * 8 * kTokenTiles;
    }

    // The row of W of this thread's outputs i = 2 * half and the next.
    __device__ int64_t row_of(int w, int half) const { return first_row + warp_row() + w * 16 + half * 8 + lane() / 4; }

    // Calls run(w, tile, i, m, n) for those of this thread's outputs that are there.
    template <typename Run>
    __device__ void for_each_output(const Run& run) const {
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = row_of(w, i / 2);
                    const int64_t m = first_token + warp_token() + tile * 8 + lane() % 4 * 2 + i % 2;
                    if (n < p.N && m < p.M) run(w, tile, i, m, n);
                }
            }
        }
    }
};

}  // namespace hb
