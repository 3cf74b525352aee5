// out = x * W^T + bias with W in 4 bits, on tensor cores (sm_80 and later): x in 16 bits, K a multiple of 64. For
// one W, and for those of experts, whose rows of x are found on the device (experts.cuh).
//
// A thread block of four warps makes a tile of out; each warp has 16 or 32 rows of W of its own and all of the tile's
// rows of x, so that a weight is decoded once per tile. W is the left operand: its rows fill the 16 that the tensor
// core wants whatever M is, and rows of x come in eights.
//
//     shared memory:  16 table entries, one copy per lane | 256 entries of the absmax map | a ring of stages
//     a stage:        128 values of K:   packed codes, 64 bytes a row of W | x, 256 bytes a row
//     a chunk:        64 values of K, four tensor-core steps of 16
//
// Nothing is rearranged in memory: the order of K within a chunk is free as long as both operands agree. Of 64 values,
// lane t of a group of four takes 16t .. 16t+15, which are 8 neighbouring bytes of codes and 32 of x:
//
//     step j, lane t:  the tensor core's columns 2t, 2t+1, 2t+8, 2t+9  are  k = 16t + 4j + 0, 1, 2, 3
//
// and since blocks hold at least 32 values, those 16 share one absmax. A weight is what dequantize4 gives, bit for bit:
// T(table[code] * absmax). Its look-up is one 4-byte read that no two lanes make from the same bank: 32 weights a clock
// and multiprocessor, which an A100's memory does not outrun, but an H200's would.
//
// Pipeline: a stage's copies start two or three stages ahead; a single barrier per stage says both that its bytes are
// here and that the slot read before may be written again. absmax is read one stage ahead into registers, as stored.
// 16-byte pieces lie in an order in which the eight (of x) or sixteen (of codes) lanes of one access meet no bank
// twice.
//
// Promises: a row's result does not depend on M (linear4_mma.h), nor on how x is aligned; the same bits every time.
#include "experts.cuh"
#include "linear4_mma.h"
#include "linear4_parts.cuh"

namespace hb {

namespace {

constexpr int kThreads = kWarpsPerBlock * kWarp;
constexpr int kChunks = kStageValues / kChunkValues;
constexpr int kXRowBytes = kStageValues * 2;
constexpr int kTableBytes = 16 * kWarp * 4;
constexpr int kMapBytes = 256 * 4;  // used where absmax is double-quantized
constexpr int kLaneValues = 16;     // of a chunk

struct Problem {
    const void* x;
    bool x_aligned;  // to kPieceBytes
    const uint8_t* packed;
    Scales scales;
    int64_t M, N, K;
    int64_t format;
    const void* bias;
    int64_t bias_dtype;
    void* out;
    int64_t out_stride;
    float* slices;  // [slices, M, N], or null: a thread block adds up its slices itself
    int64_t slice_stages;
    int64_t token_tiles;
    int64_t tiles;
};

// Where 16-byte piece `piece` of a row lies in its row.
__device__ int place_of_codes(int row, int piece) {
    return (piece ^ (row & 2)) * kPieceBytes;
}
__device__ int place_of_x(int row, int piece) {
    return (piece ^ (row & 1)) * kPieceBytes;
}

template <typename T, int WeightTiles, int TokenTiles, int Stages>
struct Linear4 {
    static constexpr int kWarpRows = WeightTiles * 16;
    static constexpr int kRows = kWarpRows * kWarpsPerBlock;
    static constexpr int kTokens = TokenTiles * 8;
    static constexpr int kStageBytes = kRows * kCodeRowBytes + kTokens * kXRowBytes;
    static constexpr int kSharedBytes = kTableBytes + kMapBytes + Stages * kStageBytes;

    const Problem& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;
    float sums[WeightTiles][TokenTiles][4];    // of this slice
    float totals[WeightTiles][TokenTiles][4];  // of the slices before
    float scales[kChunks][WeightTiles][2];     // absmax of rows g and g + 8 in the stage that comes next

    __device__ unsigned char* codes_of(int64_t stage) const {
        return shared + kTableBytes + kMapBytes + stage % Stages * kStageBytes;
    }
    __device__ unsigned char* x_of(int64_t stage) const { return codes_of(stage) + kRows * kCodeRowBytes; }

    __device__ void fill_tables() {
        float* const table = reinterpret_cast<float*>(shared);
        for (int i = static_cast<int>(threadIdx.x); i < 16 * kWarp; i += kThreads) {
            table[i] = code_value(p.format, i / kWarp);
        }
        if (p.scales.absmax.nested_absmax != nullptr) {
            float* const map = reinterpret_cast<float*>(shared + kTableBytes);
            for (int i = static_cast<int>(threadIdx.x); i < kMap.length; i += kThreads) map[i] = kMap.at[i];
        }
        block_barrier();
    }

    // Starts the copies of a stage. Rows behind the last are zeros; what lies behind K is never looked at.
    __device__ void fetch(int64_t stage) {
        constexpr int code_pieces = kCodeRowBytes / kPieceBytes;
        for (int i = static_cast<int>(threadIdx.x); i < kRows * code_pieces; i += kThreads) {
            const int row = i / code_pieces, piece = i % code_pieces;
            const int64_t k = stage * kStageValues + piece * kPieceBytes * 2;
            const bool there = first_row + row < p.N && k < p.K;
            const uint8_t* const from = there ? p.packed + ((first_row + row) * p.K + k) / 2 : p.packed;
            copy_16_bytes(codes_of(stage) + row * kCodeRowBytes + place_of_codes(row, piece), from, there);
        }
        constexpr int x_pieces = kXRowBytes / kPieceBytes;
        for (int i = static_cast<int>(threadIdx.x); i < kTokens * x_pieces; i += kThreads) {
            const int row = i / x_pieces, piece = i % x_pieces;
            const int64_t k = stage * kStageValues + piece * (kPieceBytes / 2);
            const bool there = first_token + row < p.M && k < p.K;
            const T* const from = static_cast<const T*>(p.x) + (there ? (first_token + row) * p.K + k : 0);
            unsigned char* const to = x_of(stage) + row * kXRowBytes + place_of_x(row, piece);
            if (p.x_aligned) {
                copy_16_bytes(to, from, there);
            } else {
                T* const values = reinterpret_cast<T*>(to);
                for (int v = 0; v < kPieceBytes / 2; ++v) values[v] = there ? from[v] : from_float<T>(0.0f);
            }
        }
    }

    __device__ float scale_at(int64_t row, int64_t k) const {
        if (row >= p.N || k >= p.K) return 0.0f;
        const float* const map = reinterpret_cast<const float*>(shared + kTableBytes);
        return p.scales.value(p.scales.stored(row * p.K + k), map);
    }

    __device__ int64_t warp_row() const { return static_cast<int64_t>(threadIdx.x) / kWarp * kWarpRows; }

    __device__ void read_scales(int64_t stage) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int64_t k = stage * kStageValues + chunk * kChunkValues + lane() % 4 * kLaneValues;
#pragma unroll
            for (int w = 0; w < WeightTiles; ++w) {
                const int64_t row = first_row + warp_row() + w * 16 + lane() / 4;
                scales[chunk][w][0] = scale_at(row, k);
                scales[chunk][w][1] = scale_at(row + 8, k);
            }
        }
    }

    // The two weights of byte `which` of a word of codes, side by side.
    __device__ unsigned decode(unsigned word, int which, float scale) const {
        // A code's place in the table, in bytes: a row of the table has one entry per lane.
        const unsigned own = static_cast<unsigned>(lane()) * 4u;
        constexpr unsigned rows = 15u * kWarp * 4u;
        const int shift = which * 8;
        const unsigned high = shift == 24 ? word >> 21 : (shift >= 8 ? word >> (shift - 3) : word << 3);
        const unsigned low = shift >= 8 ? word >> (shift - 7) : word << 7;
        const float first = *reinterpret_cast<const float*>(shared + ((high & rows) | own));
        const float second = *reinterpret_cast<const float*>(shared + ((low & rows) | own));
        return pair_of<T>(__fmul_rn(first, scale), __fmul_rn(second, scale));
    }

    __device__ void multiply_chunk(const unsigned char* codes, const unsigned char* x, int chunk,
                                   const float (&scale)[WeightTiles][2]) {
        const int group = lane() / 4, member = lane() % 4;
        unsigned weights[WeightTiles][4][4];
#pragma unroll
        for (int w = 0; w < WeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = static_cast<int>(warp_row()) + w * 16 + half * 8 + group;
                const int at = place_of_codes(row, chunk * 2 + member / 2) + member % 2 * 8;
                const uint2 words = *reinterpret_cast<const uint2*>(codes + row * kCodeRowBytes + at);
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    const unsigned word = step < 2 ? words.x : words.y;
                    weights[w][step][half] = decode(word, step % 2 * 2, scale[w][half]);
                    weights[w][step][half + 2] = decode(word, step % 2 * 2 + 1, scale[w][half]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TokenTiles; ++tile) {
            const int row = tile * 8 + group;
            const int piece = chunk * 8 + member * 2;
            const uint4 near = *reinterpret_cast<const uint4*>(x + row * kXRowBytes + place_of_x(row, piece));
            const uint4 far = *reinterpret_cast<const uint4*>(x + row * kXRowBytes + place_of_x(row, piece + 1));
            const unsigned tokens[4][2] = {{near.x, near.y}, {near.z, near.w}, {far.x, far.y}, {far.z, far.w}};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
#pragma unroll
                for (int w = 0; w < WeightTiles; ++w) {
                    multiply_tiles<T>(sums[w][tile], weights[w][step], tokens[step]);
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
                    totals[w][tile][i] = __fadd_rn(totals[w][tile][i], sums[w][tile][i]);
                    sums[w][tile][i] = 0;
                }
            }
        }
    }

    __device__ void multiply_stages(int64_t begin, int64_t end) {
        read_scales(begin);
#pragma unroll
        for (int ahead = 0; ahead < Stages - 1; ++ahead) {
            if (begin + ahead < end) fetch(begin + ahead);
            copies_commit();
        }
        for (int64_t stage = begin; stage < end; ++stage) {
            copies_wait<Stages - 2>();
            block_barrier();
            if (stage + Stages - 1 < end) fetch(stage + Stages - 1);
            copies_commit();
            float now[kChunks][WeightTiles][2];
            memcpy(now, scales, sizeof now);
            read_scales(stage + 1);
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                if (stage * kStageValues + chunk * kChunkValues < p.K) {
                    multiply_chunk(codes_of(stage), x_of(stage), chunk, now[chunk]);
                }
            }
            if ((stage + 1) % p.slice_stages == 0 || stage + 1 == end) end_slice();
        }
    }

    __device__ void write(int64_t slice) const {
#pragma unroll
        for (int w = 0; w < WeightTiles; ++w) {
#pragma unroll
            for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = first_row + warp_row() + w * 16 + i / 2 * 8 + lane() / 4;
                    const int64_t m = first_token + tile * 8 + lane() % 4 * 2 + i % 2;
                    if (n >= p.N || m >= p.M) continue;
                    if (p.slices != nullptr) {
                        p.slices[(slice * p.M + m) * p.N + n] = totals[w][tile][i];
                    } else {
                        const float add = p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, n);
                        static_cast<T*>(p.out)[m * p.out_stride + n] =
                            from_float<T>(__fadd_rn(totals[w][tile][i], add));
                    }
                }
            }
        }
    }
};

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache.
template <typename T, int WeightTiles, int TokenTiles, int Stages>
__global__ void __launch_bounds__(kThreads) linear4_mma(Problem p) {
    using Kernel = Linear4<T, WeightTiles, TokenTiles, Stages>;
    const int64_t tile = blockIdx.x % p.tiles;
    const int64_t slice = blockIdx.x / p.tiles;
    Kernel kernel = {
        p, tile / p.token_tiles * Kernel::kRows, tile % p.token_tiles * Kernel::kTokens, shared_memory(), {}, {}, {}};
    kernel.fill_tables();
    const int64_t stages = (p.K + kStageValues - 1) / kStageValues;
    const int64_t begin = slice * p.slice_stages;
    const int64_t slice_end = begin + p.slice_stages;
    kernel.multiply_stages(begin, p.slices != nullptr && slice_end < stages ? slice_end : stages);
    kernel.write(slice);
}

// A matrix of the expert whose rows `tile` has, on these rows alone.
template <typename T>
__device__ Problem problem_of(const Problem& all, const Experts& experts, const ExpertTile& tile, int64_t matrix) {
    const int64_t number = tile.expert * experts.matrices + matrix;
    Problem own = all;
    own.x = static_cast<const T*>(all.x) + tile.first * all.K;
    own.M = tile.rows;
    own.packed = all.packed + number * experts.packed_bytes;
    own.scales.absmax = experts.absmax_of(all.scales.absmax, number);
    if (all.bias != nullptr) {
        const int64_t bytes = number * all.N * (all.bias_dtype == HB_FLOAT32 ? 4 : 2);
        own.bias = static_cast<const unsigned char*>(all.bias) + bytes;
    }
    own.out = static_cast<T*>(all.out) + tile.first * all.out_stride + matrix * all.N;
    return own;
}

// Neighbouring blocks have the same rows of W of neighbouring tiles, which often are one expert's.
template <typename T, int WeightTiles, int TokenTiles, int Stages>
__global__ void __launch_bounds__(kThreads) linear4_experts_mma(Problem all, Experts experts) {
    using Kernel = Linear4<T, WeightTiles, TokenTiles, Stages>;
    const int64_t row_tiles = (all.N + Kernel::kRows - 1) / Kernel::kRows;
    const int64_t matrix = blockIdx.x / all.token_tiles / row_tiles;
    const int64_t first_row = blockIdx.x / all.token_tiles % row_tiles * Kernel::kRows;
    const ExpertTile tile = find_expert_tile(experts, all.M, Kernel::kTokens, blockIdx.x % all.token_tiles);
    if (tile.rows == 0) return;
    const Problem p = problem_of<T>(all, experts, tile, matrix);
    if (tile.expert == experts.count) {
        const int64_t columns = p.N - first_row < Kernel::kRows ? p.N - first_row : Kernel::kRows;
        for (int64_t i = threadIdx.x; i < tile.rows * columns; i += kThreads) {
            static_cast<T*>(p.out)[i / columns * p.out_stride + first_row + i % columns] = from_float<T>(0.0f);
        }
        return;
    }
    Kernel kernel = {p, first_row, 0, shared_memory(), {}, {}, {}};
    kernel.fill_tables();
    kernel.multiply_stages(0, (p.K + kStageValues - 1) / kStageValues);
    kernel.write(0);
}

template <typename T, int WeightTiles, int TokenTiles, int Stages>
void launch_tile(const Problem& problem, unsigned blocks, cudaStream_t stream) {
    constexpr int bytes = Linear4<T, WeightTiles, TokenTiles, Stages>::kSharedBytes;
    launch(linear4_mma<T, WeightTiles, TokenTiles, Stages>, blocks, kThreads, bytes, stream, problem);
}

template <typename T>
void launch_dtype(const hb_linear4_args& a, const Linear4Plan& plan, const Problem& problem) {
    // As many tiles as a grid cannot have would be an output that no device can hold.
    const unsigned blocks = static_cast<unsigned>(plan.tiles * (plan.apart ? plan.slices : 1));
    const cudaStream_t stream = stream_of(a.call);
    switch (plan.tile.tokens) {
        case 8:
            launch_tile<T, 1, 1, 4>(problem, blocks, stream);
            break;
        case 16:
            launch_tile<T, 1, 2, 4>(problem, blocks, stream);
            break;
        case 32:
            launch_tile<T, 1, 4, 4>(problem, blocks, stream);
            break;
        default:
            launch_tile<T, 2, 8, 3>(problem, blocks, stream);
    }
    if (!plan.apart) return;
    launch(add_slices<T>, blocks_for_adding(a.M * a.N), kAddingThreads, 0, stream, problem.slices, plan.slices, a.M,
           a.N, a.bias, a.bias_dtype, static_cast<T*>(a.out));
}

template <typename T, int TokenTiles, int Stages>
void launch_experts_tile(const Problem& problem, const Experts& experts, unsigned blocks, cudaStream_t stream) {
    constexpr int bytes = Linear4<T, 1, TokenTiles, Stages>::kSharedBytes;
    launch(linear4_experts_mma<T, 1, TokenTiles, Stages>, blocks, kThreads, bytes, stream, problem, experts);
}

template <typename T>
void launch_experts_dtype(const hb_linear4_experts_args& a, const ExpertsPlan& plan, const Problem& problem) {
    const Experts experts(a);
    const unsigned blocks =
        static_cast<unsigned>(plan.token_tiles * ceil_div(a.N, kSmallestWeightRows) * experts.matrices);
    const cudaStream_t stream = stream_of(a.call);
    switch (plan.tokens) {
        case 8:
            launch_experts_tile<T, 1, 4>(problem, experts, blocks, stream);
            break;
        case 16:
            launch_experts_tile<T, 2, 4>(problem, experts, blocks, stream);
            break;
        case 32:
            launch_experts_tile<T, 4, 4>(problem, experts, blocks, stream);
            break;
        default:
            launch_experts_tile<T, 8, 3>(problem, experts, blocks, stream);
    }
}

// What calls of one weight and of experts' weights have in common.
template <typename Args>
Problem problem_for(const Args& a) {
    Problem problem = {};
    problem.x = a.x;
    problem.x_aligned = reinterpret_cast<uintptr_t>(a.x) % kPieceBytes == 0;
    problem.packed = a.packed;
    problem.scales = Scales(a);
    problem.M = a.M, problem.N = a.N, problem.K = a.K;
    problem.format = a.format;
    problem.bias = a.bias;
    problem.bias_dtype = a.bias_dtype;
    problem.out = a.out;
    return problem;
}

}  // namespace

void launch_linear4_experts_mma(const hb_linear4_experts_args& a) {
    const ExpertsPlan plan = plan_experts(a);
    Problem problem = problem_for(a);
    problem.out_stride = a.P * a.N;
    problem.slice_stages = plan.slice_stages;
    problem.token_tiles = plan.token_tiles;
    if (a.x_dtype == HB_FLOAT16) {
        launch_experts_dtype<__half>(a, plan, problem);
    } else {
        launch_experts_dtype<__nv_bfloat16>(a, plan, problem);
    }
}

void launch_linear4_mma(const hb_linear4_args& a, const Linear4Plan& plan) {
    Problem problem = problem_for(a);
    problem.out_stride = a.N;
    problem.slices = plan.apart ? static_cast<float*>(a.call.workspace) : nullptr;
    problem.slice_stages = plan.slice_stages;
    problem.token_tiles = ceil_div(a.M, plan.tile.tokens);
    problem.tiles = plan.tiles;
    if (a.x_dtype == HB_FLOAT16) {
        launch_dtype<__half>(a, plan, problem);
    } else {
        launch_dtype<__nv_bfloat16>(a, plan, problem);
    }
}

}  // namespace hb
