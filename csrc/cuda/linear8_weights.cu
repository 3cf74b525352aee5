// out = x * W^T + bias on tensor cores (sm_80 and later) with W in int8 and x in 16 bits, which hold a code exactly: no
// activation is rounded. Sums are float32 of x times codes; the row's absmax / 127 scales them at the end. For one W,
// and for those of experts, whose rows of x are found on the device (experts.cuh).
//
// A thread block of four warps makes a tile of out; each warp has 16 or 32 rows of W of its own and all of the tile's
// rows of x, so that a weight is converted once per tile (float_sums.cuh).
//
//     a stage:   64 or 128 values of K:   codes of the rows of W | x
//     a chunk:   64 values of K, four tensor-core steps of 16
//
// linear4_tile.cuh is this for 4 bits.
//
// Promises: a row's result does not depend on M (slices.h), nor on how x is aligned; the same bits every time.
#include "float_sums.cuh"
#include "linear8.h"

namespace hb {

namespace {

struct Problem {
    Rows codes;
    Rows x;
    int64_t K;
    Outputs outputs;
    int64_t slice_values;
    int64_t token_tiles;
    int64_t tiles;

    // Of one weight, or of the first expert's. `Plan`: MatmulPlan or ExpertsPlan.
    template <typename Args, typename Plan>
    Problem(const Args& a, const Plan& plan, float* slices)
        : codes(a.codes, a.N, a.K),
          x(a.x, a.M, a.K * 2),
          K(a.K),
          outputs{a.M, a.N, a.absmax, 1, a.bias, a.bias_dtype, a.out, a.N, slices},
          slice_values(plan.slice_values),
          token_tiles(plan.token_tiles),
          tiles(0) {}
};

template <typename T, int Number>
struct WeightsTile {
    static constexpr int kRows = kTilesOfInt8Weights[Number].rows;
    static constexpr int kTokens = kTilesOfInt8Weights[Number].tokens;
    static constexpr int kStageValues = kTilesOfInt8Weights[Number].stage_values;
    static constexpr int kStages = kTilesOfInt8Weights[Number].stages;
    static constexpr int kWarpRows = kRows / kWarpsPerBlock;
    static constexpr int kWeightTiles = kWarpRows / 16;
    static constexpr int kChunks = kStageValues / kChunkBytes;
    static constexpr int kXRowBytes = kStageValues * 2;
    static constexpr int kStageBytes = kRows * kStageValues + kTokens * kXRowBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    using PlaceOfCodes = PlaceOfBytes<kStageValues>;

    const Problem& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;
    StageCopies<PlaceOfCodes, kRows, kStageValues, kMmaThreads> codes;
    StageCopies<PlaceOfX, kTokens, kXRowBytes, kMmaThreads> x;
    LaneOfX<kXRowBytes> lane_of_x;
    FloatSums<T, kWeightTiles, kTokens / 8> sums;

    __device__ WeightsTile(const Problem& problem, int64_t row, int64_t token)
        : p(problem),
          first_row(row),
          first_token(token),
          shared(shared_memory()),
          codes(problem.codes, row),
          x(problem.x, token),
          sums{} {}

    __device__ unsigned char* codes_at(int slot) const { return shared + slot * kStageBytes; }
    __device__ unsigned char* x_at(int slot) const { return codes_at(slot) + kRows * kStageValues; }

    __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp * kWarpRows; }

    __device__ void fetch(int stage, int slot) const {
        codes.start(codes_at(slot), stage);
        x.start(x_at(slot), stage);
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
                    weights[w][step][half] = pair_of_codes<T, 0>(of_step[step]);
                    weights[w][step][half + 2] = pair_of_codes<T, 1>(of_step[step]);
                }
            }
        }
        sums.multiply(weights, x, lane_of_x, chunk);
    }

    // Columns [begin, end) of K, of whole slices but for the last one.
    __device__ void multiply(int64_t begin, int64_t end) {
        const int slice_stages = static_cast<int>(p.slice_values / kStageValues);
        const int last = static_cast<int>((end + kStageValues - 1) / kStageValues);
        const int chunks = static_cast<int>((p.K + kChunkBytes - 1) / kChunkBytes);
        int left = slice_stages;
        run_pipeline<kStages>(
            static_cast<int>(begin / kStageValues), last, [&](int stage, int slot) { fetch(stage, slot); },
            [&](int stage, int slot) {
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    if (stage * kChunks + chunk < chunks) multiply_chunk(codes_at(slot), x_at(slot), chunk);
                }
                if (--left == 0 || stage + 1 == last) {
                    sums.end_slice();
                    left = slice_stages;
                }
            });
    }

    __device__ void write(int64_t slice) const { sums.write(p.outputs, first_row + warp_row(), first_token, slice); }
};

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache.
template <typename T, int Number>
__global__ void __launch_bounds__(kMmaThreads) multiply_by_weights(Problem p) {
    using Tile = WeightsTile<T, Number>;
    const int64_t number = blockIdx.x % p.tiles;
    const int64_t slice = blockIdx.x / p.tiles;
    Tile tile(p, number / p.token_tiles * Tile::kRows, number % p.token_tiles * Tile::kTokens);
    const int64_t begin = slice * p.slice_values;
    const int64_t slice_end = begin + p.slice_values;
    tile.multiply(begin, p.outputs.slices != nullptr && slice_end < p.K ? slice_end : p.K);
    tile.write(slice);
}

// Neighbouring blocks have the same rows of W of neighbouring tiles, which often are one expert's.
template <typename T, int Number>
__global__ void __launch_bounds__(kMmaThreads) multiply_by_experts(Problem all, ExpertRows experts) {
    using Tile = WeightsTile<T, Number>;
    const int64_t first_row = blockIdx.x / all.token_tiles * Tile::kRows;
    const ExpertTile found = find_expert_tile(experts, Tile::kTokens, blockIdx.x % all.token_tiles);
    if (found.rows == 0) return;
    Problem p = all;
    p.x = all.x.from(found.first, found.rows);
    p.outputs = all.outputs.template of_expert<T>(found, found.expert, 0);
    if (found.expert == experts.count) {
        p.outputs.template clear<T>(first_row, Tile::kRows);
        return;
    }
    p.codes = all.codes.behind(found.expert * all.outputs.N * all.K, all.outputs.N);
    Tile tile(p, first_row, 0);
    tile.multiply(0, p.K);
    tile.write(0);
}

template <typename T>
void launch_for(const hb_linear8_args& a, const MatmulPlan& plan) {
    Problem problem(a, plan, plan.apart ? static_cast<float*>(a.call.workspace) : nullptr);
    problem.tiles = plan.tiles;
    with_number<count_of(kTilesOfInt8Weights)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        constexpr int bytes = WeightsTile<T, which>::kSharedBytes;
        launch(multiply_by_weights<T, which>, plan.blocks(), kMmaThreads, bytes, stream_of(a.call), problem);
    });
    if (!plan.apart) return;
    launch(add_slices<T>, blocks_for_adding(a.M * a.N), kAddingThreads, 0, stream_of(a.call), problem.outputs,
           plan.slices);
}

template <typename T>
void launch_for(const hb_linear8_experts_args& a, const ExpertsPlan& plan) {
    const Problem problem(a, plan, nullptr);
    const ExpertRows experts = {a.ends, a.E, a.M};
    with_number<count_of(kTilesOfInt8Weights)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        constexpr int bytes = WeightsTile<T, which>::kSharedBytes;
        launch(multiply_by_experts<T, which>, plan.blocks(1), kMmaThreads, bytes, stream_of(a.call), problem, experts);
    });
}

}  // namespace

void launch_linear8_weights(const hb_linear8_args& a, const MatmulPlan& plan) {
    if (a.x_dtype == HB_FLOAT16) {
        launch_for<__half>(a, plan);
    } else {
        launch_for<__nv_bfloat16>(a, plan);
    }
}

void launch_linear8_experts_weights(const hb_linear8_experts_args& a) {
    const ExpertsPlan plan = plan_experts(kTilesOfInt8Weights, a.M, a.E, a.N, a.K);
    if (a.x_dtype == HB_FLOAT16) {
        launch_for<__half>(a, plan);
    } else {
        launch_for<__nv_bfloat16>(a, plan);
    }
}

}  // namespace hb
