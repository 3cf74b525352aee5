// out = x * W^T + bias on tensor cores (sm_80 and later) with W in int8 and x in 16 bits, which hold a code exactly: no
// activation is rounded. Sums are float32 of x times codes; the row's absmax / 127 scales them at the end.
//
// A thread block of four warps makes a tile of out; each warp has 16 or 32 rows of W of its own and all of the tile's
// rows of x, so that a weight is converted once per tile. W is the left operand: its rows fill the 16 that the tensor
// core wants whatever M is, and rows of x come in eights.
//
//     a stage:   64 or 128 values of K:   codes of the rows of W | x
//     a chunk:   64 values of K, four tensor-core steps of 16
//
//     step j, lane t:  the tensor core's columns 2t, 2t+1, 2t+8, 2t+9  are  k = 16t + 4j + 0, 1, 2, 3
//
// linear4_mma.cu is this for 4 bits.
//
// Promises: a row's result does not depend on M (linear8_plan.h), nor on how x is aligned; the same bits every time.
#include "int8.cuh"
#include "linear8_stages.cuh"

namespace hb {

namespace {

constexpr int kThreads = kWarpsPerBlock * kWarp;

struct Problem {
    Rows codes;
    Rows x;
    const float* absmax;
    int64_t M, N, K;
    const void* bias;
    int64_t bias_dtype;
    void* out;
    float* slices;  // [slices, M, N], or null: a thread block adds up its slices itself
    int64_t slice_values;
    int64_t token_tiles;
    int64_t tiles;

    template <typename T>
    __device__ void finish(float sum, int64_t m, int64_t n) const {
        const float scaled = __fmul_rn(sum, int8_scale(absmax[n]));
        const float add = bias == nullptr ? 0.0f : load_float(bias, bias_dtype, n);
        static_cast<T*>(out)[m * N + n] = from_float<T>(__fadd_rn(scaled, add));
    }
};

struct PlaceOfX {
    __device__ static int of(int row, int piece) { return piece ^ (row & 1); }
};

template <typename T, int Number>
struct WeightsTile {
    static constexpr int kRows = kTilesOfInt8Weights[Number].rows;
    static constexpr int kTokens = kTilesOfInt8Weights[Number].tokens;
    static constexpr int kStageValues = kTilesOfInt8Weights[Number].stage_values;
    static constexpr int kStages = kTilesOfInt8Weights[Number].stages;
    static constexpr int kWarpRows = kRows / kWarpsPerBlock;
    static constexpr int kWeightTiles = kWarpRows / 16;
    static constexpr int kTokenTiles = kTokens / 8;
    static constexpr int kChunks = kStageValues / kChunkBytes;
    static constexpr int kXRowBytes = kStageValues * 2;
    static constexpr int kStageBytes = kRows * kStageValues + kTokens * kXRowBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    using PlaceOfCodes = PlaceOfBytes<kStageValues>;

    const Problem& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;
    float sums[kWeightTiles][kTokenTiles][4];    // of this slice
    float totals[kWeightTiles][kTokenTiles][4];  // of the slices before

    __device__ unsigned char* codes_of(int64_t stage) const { return shared + stage % kStages * kStageBytes; }
    __device__ unsigned char* x_of(int64_t stage) const { return codes_of(stage) + kRows * kStageValues; }

    __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp * kWarpRows; }

    __device__ void fetch(int64_t stage) {
        copy_rows<PlaceOfCodes, kRows, kStageValues, kThreads>(codes_of(stage), p.codes, first_row,
                                                               stage * kStageValues);
        copy_rows<PlaceOfX, kTokens, kXRowBytes, kThreads>(x_of(stage), p.x, first_token, stage * kXRowBytes);
    }

    __device__ void multiply_chunk(const unsigned char* codes, const unsigned char* x, int chunk) {
        const int group = lane() / 4, member = lane() % 4;
        unsigned weights[kWeightTiles][4][4];
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row() + w * 16 + half * 8 + group;
                const int place = PlaceOfCodes::of(row, chunk * (kChunkBytes / kPieceBytes) + member) * kPieceBytes;
                const uint4 own = *reinterpret_cast<const uint4*>(codes + row * kStageValues + place);
                const unsigned of_step[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    weights[w][step][half] = pair_of_codes<T>(__byte_perm(of_step[step], 0, 0x4140));
                    weights[w][step][half + 2] = pair_of_codes<T>(__byte_perm(of_step[step], 0, 0x4342));
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            const int row = tile * 8 + group;
            const int piece = chunk * (kChunkBytes * 2 / kPieceBytes) + member * 2;
            const unsigned char* const values = x + row * kXRowBytes;
            const uint4 near = *reinterpret_cast<const uint4*>(values + PlaceOfX::of(row, piece) * kPieceBytes);
            const uint4 far = *reinterpret_cast<const uint4*>(values + PlaceOfX::of(row, piece + 1) * kPieceBytes);
            const unsigned tokens[4][2] = {{near.x, near.y}, {near.z, near.w}, {far.x, far.y}, {far.z, far.w}};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
#pragma unroll
                for (int w = 0; w < kWeightTiles; ++w) {
                    multiply_tiles<T>(sums[w][tile], weights[w][step], tokens[step]);
                }
            }
        }
    }

    __device__ void end_slice() {
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    totals[w][tile][i] = __fadd_rn(totals[w][tile][i], sums[w][tile][i]);
                    sums[w][tile][i] = 0;
                }
            }
        }
    }

    __device__ void multiply_stages(int64_t begin, int64_t end) {
        const int64_t slice_stages = p.slice_values / kStageValues;
        run_pipeline<kStages>(
            begin, end, [&](int64_t stage) { fetch(stage); },
            [&](int64_t stage) {
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    if (stage * kStageValues + chunk * kChunkBytes < p.K) {
                        multiply_chunk(codes_of(stage), x_of(stage), chunk);
                    }
                }
                if ((stage + 1) % slice_stages == 0 || stage + 1 == end) end_slice();
            });
    }

    __device__ void write(int64_t slice) const {
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = first_row + warp_row() + w * 16 + i / 2 * 8 + lane() / 4;
                    const int64_t m = first_token + tile * 8 + lane() % 4 * 2 + i % 2;
                    if (n >= p.N || m >= p.M) continue;
                    if (p.slices != nullptr) {
                        p.slices[(slice * p.M + m) * p.N + n] = totals[w][tile][i];
                    } else {
                        p.template finish<T>(totals[w][tile][i], m, n);
                    }
                }
            }
        }
    }
};

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache.
template <typename T, int Number>
__global__ void __launch_bounds__(kThreads) multiply_by_weights(Problem p) {
    using Tile = WeightsTile<T, Number>;
    const int64_t number = blockIdx.x % p.tiles;
    const int64_t slice = blockIdx.x / p.tiles;
    Tile tile = {p, number / p.token_tiles * Tile::kRows, number % p.token_tiles * Tile::kTokens, shared_memory(), {},
                 {}};
    const int64_t begin = slice * p.slice_values;
    const int64_t slice_end = begin + p.slice_values;
    const int64_t end = p.slices != nullptr && slice_end < p.K ? slice_end : p.K;
    tile.multiply_stages(begin / Tile::kStageValues, (end + Tile::kStageValues - 1) / Tile::kStageValues);
    tile.write(slice);
}

template <typename T>
__global__ void add_slices(Problem p, int64_t count) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.M * p.N; i += stride) {
        float sum = 0;
        for (int64_t slice = 0; slice < count; ++slice) sum = __fadd_rn(sum, p.slices[slice * p.M * p.N + i]);
        p.template finish<T>(sum, i / p.N, i % p.N);
    }
}

template <typename T>
void launch_for(const Problem& p, const Linear8Plan& plan, cudaStream_t stream) {
    with_number<count_of(kTilesOfInt8Weights)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        constexpr int bytes = WeightsTile<T, which>::kSharedBytes;
        launch(multiply_by_weights<T, which>, plan.blocks(), kThreads, bytes, stream, p);
    });
    if (!plan.apart) return;
    launch(add_slices<T>, blocks_for_warps(ceil_div(p.M * p.N, kWarp)), kThreads, 0, stream, p, plan.slices);
}

}  // namespace

void launch_linear8_weights(const hb_linear8_args& a, const Linear8Plan& plan) {
    const Problem p = {Rows(a.codes, a.N, a.K),
                       Rows(a.x, a.M, a.K * 2),
                       a.absmax,
                       a.M,
                       a.N,
                       a.K,
                       a.bias,
                       a.bias_dtype,
                       a.out,
                       plan.apart ? static_cast<float*>(a.call.workspace) : nullptr,
                       plan.slice_values,
                       plan.token_tiles,
                       plan.tiles};
    if (a.x_dtype == HB_FLOAT16) {
        launch_for<__half>(p, plan, stream_of(a.call));
    } else {
        launch_for<__nv_bfloat16>(p, plan, stream_of(a.call));
    }
}

}  // namespace hb
