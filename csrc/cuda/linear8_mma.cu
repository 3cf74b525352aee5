// LLM.int8() on tensor cores (sm_80 and later): int8 codes of x times those of W with exact sums in int32, then scales,
// outliers and bias in float32 on the sums, in the order of the CPU library and the reference. For one W, and for those
// of experts, whose rows of x are found on the device (experts.cuh).
//
//     a stage:        64 or 128 bytes of the tile's rows of W | as many of its rows of x's codes
//     a chunk:        64 values of K, two tensor-core steps of 32
//
//     step j, lane t:  the tensor core's columns 4t .. 4t+3, 4t+16 .. 4t+19  are  k = 16t + 8j + 0 .. 7
//
// Where K is cut into slices, sums go to the workspace, and finish_slices does with them what else multiply_int8 does
// itself. Slices are never longer than an int32 holds, and are added up in 64 bits.
//
// Promises: results equal to the reference bit for bit, so that they do not depend on M, other rows, or slices.
#include "experts.cuh"
#include "int8.cuh"
#include "linear8_outliers.cuh"

namespace hb {

namespace {

template <int Number>
struct Int8Multiplier {
    using Tile = Int8Tile<Number>;
    using Place = PlaceOfBytes<Tile::kStageValues>;

    const Tile& tile;
    StageCopies<Place, Tile::kRows, Tile::kStageValues, Tile::kThreads> codes;
    StageCopies<Place, Tile::kTokens, Tile::kStageValues, Tile::kThreads> x;

    __device__ explicit Int8Multiplier(const Tile& of)
        : tile(of), codes(of.p.codes, of.first_row), x(of.p.x, of.first_token) {}

    __device__ unsigned char* codes_at(int slot) const { return tile.shared + slot * Tile::kStageBytes; }
    __device__ unsigned char* x_at(int slot) const { return codes_at(slot) + Tile::kRows * Tile::kStageValues; }

    __device__ void fetch(int stage, int slot) const {
        codes.start(codes_at(slot), stage);
        x.start(x_at(slot), stage);
    }

    __device__ static uint4 lane_values(const unsigned char* rows, int row, int chunk) {
        const int place = Place::of(row, chunk * (kChunkBytes / kPieceBytes) + lane() % 4);
        return *reinterpret_cast<const uint4*>(rows + row * Tile::kStageValues + place * kPieceBytes);
    }

    __device__ static void multiply_chunk(typename Tile::Sums& sums, const unsigned char* codes, const unsigned char* x,
                                          int chunk) {
        const int group = lane() / 4;
        unsigned weights[Tile::kWeightTiles][2][4];
#pragma unroll
        for (int w = 0; w < Tile::kWeightTiles; ++w) {
            const uint4 upper = lane_values(codes, Tile::warp_row() + w * 16 + group, chunk);
            const uint4 lower = lane_values(codes, Tile::warp_row() + w * 16 + group + 8, chunk);
            const unsigned both[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
            memcpy(weights[w], both, sizeof both);
        }
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
            const uint4 values = lane_values(x, Tile::warp_token() + t * 8 + group, chunk);
            const unsigned tokens[2][2] = {{values.x, values.y}, {values.z, values.w}};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int w = 0; w < Tile::kWeightTiles; ++w) {
                    multiply_int8_tiles(sums[w][t], weights[w][step], tokens[step]);
                }
            }
        }
    }

    // Columns [begin, end) of K.
    __device__ void multiply(typename Tile::Sums& sums, int64_t begin, int64_t end) const {
        run_pipeline<Tile::kStages>(
            static_cast<int>(begin / Tile::kStageValues),
            static_cast<int>((end + Tile::kStageValues - 1) / Tile::kStageValues),
            [&](int stage, int slot) { fetch(stage, slot); },
            [&](int, int slot) {
#pragma unroll
                for (int chunk = 0; chunk < Tile::kStageValues / kChunkBytes; ++chunk) {
                    multiply_chunk(sums, codes_at(slot), x_at(slot), chunk);
                }
            });
    }
};

// What the columns of out that a thread has are scaled with, and what comes on top.
template <int Number>
struct Columns {
    float absmax[Int8Tile<Number>::kWeightTiles][2];
    float outlier_scale[Int8Tile<Number>::kWeightTiles][2];
    float add[Int8Tile<Number>::kWeightTiles][2];

    __device__ explicit Columns(const Int8Tile<Number>& tile) {
        const Int8Product& p = tile.p;
#pragma unroll
        for (int w = 0; w < Int8Tile<Number>::kWeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t n = tile.row_of(w, half);
                absmax[w][half] = n < p.N ? p.absmax[n] : 0.0f;
                outlier_scale[w][half] = int8_scale(absmax[w][half]);
                // A negative zero changes nothing that it is added to, neither sign of zero.
                add[w][half] = n < p.N && p.bias != nullptr ? load_float(p.bias, p.bias_dtype, n) : -0.0f;
            }
        }
    }
};

// Writes the tile, given exact(w, tile, i, m, n): an output's sum, rounded to float32.
template <int Number, typename Exact>
__device__ void finish(const Int8Tile<Number>& tile, const Exact& exact) {
    const Int8Product& p = tile.p;
    typename Int8Tile<Number>::Totals totals = {};
    const Outliers<Number> outliers(tile);
    if (outliers.any()) outliers.add(totals);
    const Columns<Number> columns(tile);
    tile.for_each_output([&](int w, int t, int i, int64_t m, int64_t n) {
        const float scaled = __fmul_rn(__fmul_rn(exact(w, t, i, m, n), p.rows.absmax[m]), columns.absmax[w][i / 2]);
        float result = __fmul_rn(scaled, kInt8ProductScale);
        if (p.rows.found != nullptr && p.rows.found[m] != 0) {
            result = __fadd_rn(result, __fmul_rn(totals[w][t][i], columns.outlier_scale[w][i / 2]));
        }
        store_float(__fadd_rn(result, columns.add[w][i / 2]), p.out, p.x_dtype, m * p.N + n);
    });
}

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache.
template <int Number>
__global__ void __launch_bounds__(Int8Tile<Number>::kThreads) multiply_int8(Int8Product p) {
    const int64_t slice = blockIdx.x / p.tiles;
    const Int8Tile<Number> tile(p, blockIdx.x % p.tiles);
    typename Int8Tile<Number>::Sums sums = {};
    const int64_t begin = slice * p.slice_values, end = begin + p.slice_values;
    Int8Multiplier<Number>(tile).multiply(sums, begin, end < p.K ? end : p.K);
    if (p.slices != nullptr) {
        tile.for_each_output(
            [&](int w, int t, int i, int64_t m, int64_t n) { p.slices[(slice * p.M + m) * p.N + n] = sums[w][t][i]; });
    } else {
        finish(tile, [&](int w, int t, int i, int64_t, int64_t) { return static_cast<float>(sums[w][t][i]); });
    }
}

// One size of tiles does for every plan: a result does not depend on them.
using FinishedTile = Int8Tile<kFinishedTile>;

// Slices are added up in a loop of its own, into the place of the first: within finish() it would be there once for
// each output of a thread.
__global__ void __launch_bounds__(FinishedTile::kThreads) finish_slices(Int8Product p, int64_t count) {
    const FinishedTile tile(p, blockIdx.x);
    for (int i = static_cast<int>(threadIdx.x); i < FinishedTile::kRows * FinishedTile::kTokens;
         i += FinishedTile::kThreads) {
        const int64_t n = tile.first_row + i % FinishedTile::kRows, m = tile.first_token + i / FinishedTile::kRows;
        if (n >= p.N || m >= p.M) continue;
        int64_t sum = 0;
        for (int64_t slice = 0; slice < count; ++slice) sum += p.slices[(slice * p.M + m) * p.N + n];
        p.slices[m * p.N + n] = __float_as_int(static_cast<float>(sum));
    }
    block_barrier();
    finish(tile, [&](int, int, int, int64_t m, int64_t n) { return __int_as_float(p.slices[m * p.N + n]); });
}

// An expert's weight, on its rows alone.
__device__ Int8Product product_of(const Int8Product& all, const ExpertTile& tile) {
    Int8Product own = all;
    const int64_t bytes = all.x_dtype == HB_FLOAT32 ? 4 : 2, bias_bytes = all.bias_dtype == HB_FLOAT32 ? 4 : 2;
    own.M = tile.rows;
    own.codes = all.codes.behind(tile.expert * all.N * all.K, all.N);
    own.absmax += tile.expert * all.N;
    if (all.bias != nullptr) {
        own.bias = static_cast<const unsigned char*>(all.bias) + tile.expert * all.N * bias_bytes;
    }
    own.x = all.x.from(tile.first, tile.rows);
    own.values = static_cast<const unsigned char*>(all.values) + tile.first * all.K * bytes;
    own.rows.absmax += tile.first;
    if (all.rows.found != nullptr) {
        own.rows.found += tile.first;
        own.rows.masks += tile.first * (all.rows.stride / kWordColumns);
    }
    own.out = static_cast<unsigned char*>(all.out) + tile.first * all.N * bytes;
    if (all.wide != nullptr) own.wide += tile.first * all.N;
    return own;
}

// Neighbouring blocks have the same rows of W of neighbouring tiles, which often are one expert's. A block goes over
// all of K. Wide: that is more than an int32 holds, and each thread adds up its outputs' slices in `wide`.
template <int Number, bool Wide>
__global__ void __launch_bounds__(Int8Tile<Number>::kThreads)
    multiply_int8_experts(Int8Product all, ExpertRows experts) {
    using Tile = Int8Tile<Number>;
    const int64_t first_row = blockIdx.x / all.token_tiles * Tile::kRows;
    const ExpertTile found = find_expert_tile(experts, Tile::kTokens, blockIdx.x % all.token_tiles);
    if (found.rows == 0) return;
    if (found.expert == experts.count) {
        const int64_t columns = all.N - first_row < Tile::kRows ? all.N - first_row : Tile::kRows;
        const int64_t first = found.first * all.N + first_row;
        if (all.x_dtype == HB_FLOAT32) {
            clear_rows(static_cast<float*>(all.out) + first, all.N, found.rows, columns);
        } else {  // a zero has the same bits in either format
            clear_rows(static_cast<__half*>(all.out) + first, all.N, found.rows, columns);
        }
        return;
    }
    const Int8Product p = product_of(all, found);
    const Tile tile(p, first_row, 0);
    typename Tile::Sums sums = {};
    const Int8Multiplier<Number> multiplier(tile);
    if constexpr (Wide) {
        for (int64_t begin = 0; begin < p.K; begin += kExactTerms) {
            // Stages go on where the slice before ended, in the ring too.
            multiplier.multiply(sums, begin, p.K - begin < kExactTerms ? p.K : begin + kExactTerms);
            tile.for_each_output([&](int w, int t, int i, int64_t m, int64_t n) {
                p.wide[m * p.N + n] = (begin == 0 ? 0 : p.wide[m * p.N + n]) + sums[w][t][i];
                sums[w][t][i] = 0;
            });
        }
        finish(tile, [&](int, int, int, int64_t m, int64_t n) { return static_cast<float>(p.wide[m * p.N + n]); });
    } else {
        multiplier.multiply(sums, 0, p.K);
        finish(tile, [&](int w, int t, int i, int64_t, int64_t) { return static_cast<float>(sums[w][t][i]); });
    }
}

// Of one weight, or of the first expert's. `Plan`: MatmulPlan or ExpertsPlan.
template <typename Args, typename Plan>
Int8Product product_for(const Args& a, const SplitRows& rows, const Plan& plan) {
    Int8Product product = {};
    product.codes = Rows(a.codes, a.N, a.K);
    product.x = Rows(rows.codes, a.M, rows.stride);
    product.rows = rows;
    product.values = a.x;
    product.x_dtype = a.x_dtype;
    product.absmax = a.absmax;
    product.M = a.M, product.N = a.N, product.K = a.K;
    product.bias = a.bias;
    product.bias_dtype = a.bias_dtype;
    product.out = a.out;
    product.token_tiles = plan.token_tiles;
    return product;
}

}  // namespace

void launch_linear8_mma(const hb_linear8_args& a, const SplitRows& rows, const MatmulPlan& plan, int* slices) {
    Int8Product product = product_for(a, rows, plan);
    product.slices = plan.apart ? slices : nullptr;
    product.slice_values = plan.slice_values;
    product.tiles = plan.tiles;
    const cudaStream_t stream = stream_of(a.call);
    with_number<count_of(kTilesOfInt8)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        using Tile = Int8Tile<which>;
        launch(multiply_int8<which>, plan.blocks(), Tile::kThreads, Tile::kSharedBytes, stream, product);
    });
    if (!plan.apart) return;
    product.token_tiles = ceil_div(a.M, FinishedTile::kTokens);
    const unsigned tiles = static_cast<unsigned>(ceil_div(a.N, FinishedTile::kRows) * product.token_tiles);
    launch(finish_slices, tiles, FinishedTile::kThreads, FinishedTile::kSharedBytes, stream, product, plan.slices);
}

void launch_linear8_experts_mma(const hb_linear8_experts_args& a, const SplitRows& rows, int64_t* wide) {
    // So many columns are seldom: one size of tiles does.
    const ExpertsPlan plan = plan_experts(kTilesOfInt8, wide == nullptr ? a.M : 0, a.E, a.N, a.K);
    const ExpertRows experts = {a.ends, a.E, a.M};
    const cudaStream_t stream = stream_of(a.call);
    Int8Product product = product_for(a, rows, plan);
    product.wide = wide;
    product.token_tiles = most_expert_tiles(a.M, a.E, kTilesOfInt8[plan.tile].tokens);
    const unsigned blocks = static_cast<unsigned>(product.token_tiles * plan.row_tiles);
    if (wide != nullptr) {
        launch(multiply_int8_experts<0, true>, blocks, Int8Tile<0>::kThreads, Int8Tile<0>::kSharedBytes, stream,
               product, experts);
        return;
    }
    with_number<count_of(kTilesOfInt8)>(plan.tile, [&](auto number) {
        constexpr int which = decltype(number)::value;
        using Tile = Int8Tile<which>;
        launch(multiply_int8_experts<which, false>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, product,
               experts);
    });
}

}  // namespace hb
