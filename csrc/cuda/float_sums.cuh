// What the matmuls share that multiply 16-bit x with decoded weights on mma.sync, summing in float32: a warp's sums,
// where they go, and adding up slices of K. How weights are decoded is linear4_tile.cuh's and linear8_weights.cu's.
//
// W is the left operand of the tensor core: its rows fill the 16 that it wants whatever M is, and rows of x come in
// eights. Of 64 values of K, lane t of a group of four takes 16t .. 16t+15, of either operand:
//
//     step j of 4, lane t:  the tensor core's columns 2t, 2t+1, 2t+8, 2t+9  are  k = 16t + 4j + 0, 1, 2, 3
#pragma once

#include "experts.cuh"
#include "int8.cuh"
#include "tile_stages.cuh"
#include "vocabulary_hopper.cuh"

namespace hb {

// Of rows of x in a stage: eight lanes of one access have 16 bytes each, of two rows.
struct PlaceOfX {
    __device__ static int of(int row, int piece) { return piece ^ (row & 1); }
};

// Sums become out[m, n], scaled where they are those of int8 codes, with a bias, rounded once; or a slice of them.
struct Outputs {
    int64_t M, N;
    const float* absmax;  // [N] of int8 codes; null: sums are of values
    float unit;           // that those come in
    const void* bias;     // [N] or null
    int64_t bias_dtype;
    void* out;
    int64_t stride;  // values from one row of out to the next
    float* slices;   // [slices, M, N], or null: a thread block adds up its slices itself

    template <typename T>
    __device__ void finish(float sum, int64_t m, int64_t n) const {
        const float scaled = __fmul_rn(sum, absmax == nullptr ? unit : int8_scale(absmax[n]));
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, n);
        static_cast<T*>(out)[m * stride + n] = from_float<T>(__fadd_rn(scaled, add));
    }

    // Of an expert's rows with one of its matrices, which is number `number` among those of all experts.
    template <typename T>
    __device__ Outputs of_expert(const ExpertTile& tile, int64_t number, int64_t first_column) const {
        Outputs own = *this;
        own.M = tile.rows;
        if (absmax != nullptr) own.absmax += number * N;
        if (bias != nullptr) {
            const int64_t bytes = number * N * (bias_dtype == HB_FLOAT32 ? 4 : 2);
            own.bias = static_cast<const unsigned char*>(bias) + bytes;
        }
        own.out = static_cast<T*>(out) + tile.first * stride + first_column;
        return own;
    }

    // Zeros in nobody's rows, in up to `rows` columns from first_row on.
    template <typename T>
    __device__ void clear(int64_t first_row, int64_t rows) const {
        clear_rows(static_cast<T*>(out) + first_row, stride, M, N - first_row < rows ? N - first_row : rows);
    }
};

// Where a lane finds its values of x in a stage: the two pieces of the first row of a tile that it reads, of chunk 0.
// Kept in registers, as it would else be worked out again for each stage.
template <int XRowBytes>
struct LaneOfX {
    unsigned near, far;

    __device__ LaneOfX()
        : near(kept(
              static_cast<unsigned>(lane() / 4 * XRowBytes + PlaceOfX::of(lane() / 4, lane() % 4 * 2) * kPieceBytes))),
          far(kept(near ^ static_cast<unsigned>(kPieceBytes))) {}
};

// A lane's values of one row of x, of 64 of K: for each step as the tensor core takes them.
struct Tokens {
    unsigned pairs[4][2];

    // Of the eight rows that begin at `rows` in a stage, the lane's own, of which these values are number `chunk`.
    template <int XRowBytes>
    __device__ Tokens(const unsigned char* rows, const LaneOfX<XRowBytes>& own, int chunk) {
        rows += chunk * kChunkBytes * 2;
        const uint4 near = *reinterpret_cast<const uint4*>(rows + own.near);
        const uint4 far = *reinterpret_cast<const uint4*>(rows + own.far);
        const unsigned all[4][2] = {{near.x, near.y}, {near.z, near.w}, {far.x, far.y}, {far.z, far.w}};
        memcpy(pairs, all, sizeof pairs);
    }
};

// A warp's sums: WeightTiles times 16 rows of W by TokenTiles times 8 rows of x.
template <typename T, int WeightTiles, int TokenTiles>
struct FloatSums {
    float slice[WeightTiles][TokenTiles][4];   // of this slice
    float totals[WeightTiles][TokenTiles][4];  // of the slices before

    // weights[w][step]: of 64 values of K, as the tensor core takes them. x: a stage's rows of XRowBytes, in which
    // these values are number `chunk`.
    template <int XRowBytes>
    __device__ void multiply(const unsigned (&weights)[WeightTiles][4][4], const unsigned char* x,
                             const LaneOfX<XRowBytes>& own, int chunk) {
#pragma unroll
        for (int tile = 0; tile < TokenTiles; ++tile) {
            const Tokens tokens(x + tile * 8 * XRowBytes, own, chunk);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
#pragma unroll
                for (int w = 0; w < WeightTiles; ++w) {
                    multiply_tiles<T>(slice[w][tile], weights[w][step], tokens.pairs[step]);
                }
            }
        }
    }

    // The same, added up from zero, then times the scale of rows g and g + 8 of W added to the sums.
    template <int XRowBytes>
    __device__ void multiply_scaled(const unsigned (&weights)[WeightTiles][4][4], const float (&scales)[WeightTiles][2],
                                    const unsigned char* x, const LaneOfX<XRowBytes>& own, int chunk) {
#pragma unroll
        for (int tile = 0; tile < TokenTiles; ++tile) {
            const Tokens tokens(x + tile * 8 * XRowBytes, own, chunk);
            float parts[WeightTiles][4] = {};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
#pragma unroll
                for (int w = 0; w < WeightTiles; ++w) {
                    multiply_tiles<T>(parts[w], weights[w][step], tokens.pairs[step]);
                }
            }
#pragma unroll
            for (int w = 0; w < WeightTiles; ++w) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    slice[w][tile][i] = __fmaf_rn(parts[w][i], scales[w][i / 2], slice[w][tile][i]);
                }
            }
        }
    }

    __device__ void end_slice() {
#pragma unroll
        for (int w = 0; w < WeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    totals[w][tile][i] = __fadd_rn(totals[w][tile][i], slice[w][tile][i]);
                    slice[w][tile][i] = 0;
                }
            }
        }
    }

    // From row first_row of W, the warp's own, and row first_token of x on.
    __device__ void write(const Outputs& outputs, int64_t first_row, int64_t first_token, int64_t number) const {
#pragma unroll
        for (int w = 0; w < WeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = first_row + w * 16 + i / 2 * 8 + lane() / 4;
                    const int64_t m = first_token + tile * 8 + lane() % 4 * 2 + i % 2;
                    if (n >= outputs.N || m >= outputs.M) continue;
                    if (outputs.slices != nullptr) {
                        outputs.slices[(number * outputs.M + m) * outputs.N + n] = totals[w][tile][i];
                    } else {
                        outputs.template finish<T>(totals[w][tile][i], m, n);
                    }
                }
            }
        }
    }
};

constexpr int kAddingThreads = 128;

// The sums of slices, added up in order, to their outputs.
template <typename T>
__global__ void add_slices(Outputs outputs, int64_t count) {
    predecessors_wait();
    const int64_t values = outputs.M * outputs.N;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kAddingThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAddingThreads + threadIdx.x; i < values; i += stride) {
        float sum = 0;
        for (int64_t slice = 0; slice < count; ++slice) sum = __fadd_rn(sum, outputs.slices[slice * values + i]);
        outputs.template finish<T>(sum, i / outputs.N, i % outputs.N);
    }
}

inline unsigned blocks_for_adding(int64_t values) {
    return blocks_for(values, kAddingThreads);
}

}  // namespace hb
