// out = x * W^T + bias with W in 4 bits, on Hopper's tensor cores (sm_90a): x in 16 bits, K a multiple of 64.
//
// Three kernels, each started while the one before it still runs:
//
//     arrange_x        copies x into the order in which tensor cores read it
//     linear4_hopper   the product; its codes are on the way before arrange_x has ended
//     add_slices       where sums are shared out among thread blocks (float_sums.cuh)
//
// A thread block has a producer warpgroup, which copies, and two consumers with 64 rows of W each and all of the tile's
// rows of x. Between them is a ring of stages of 128 values of K; two barriers a stage say that it is full, or empty.
//
//     shared memory:  a ring of stages | 256 pairs of table entries, one copy per lane | totals | barriers
//     a stage:        x, two tiles of 64 values of K | packed codes, 64 bytes a row of W | scales, float32
//
// W is the left operand, decoded into registers: rows of W fill the 64 that a warpgroup wants whatever M is. A byte of
// codes is two weights side by side, and one 4-byte look-up gives both as they go into the product:
// T(table[code] * lift). No two lanes look up in the same bank, so that is 64 weights a clock and multiprocessor.
//
// Their scale comes later: products of 64 neighbouring values of K, or of 32 where blocks are so small, are added up
// from zero, and that sum times the block's absmax is added to the total, in float32 with one rounding. A product of
// the dequantized weight rounds each of them to T; this rounds only the table.
//
// The order of K within 32 values is free as long as both operands agree. Lane t of a group of four takes 8t .. 8t+7,
// which are 4 neighbouring bytes of codes:
//
//     step j of 2, lane t:  the tensor core's columns 2t, 2t+1, 2t+8, 2t+9  are  k = 8t + 4j + 0, 1, 2, 3
//
// Codes stay as they are in memory; x is what arrange_x moves. So a stage's x is one piece of the workspace, and comes
// by one bulk copy without a tensor map, which only the driver's library could make. Codes come by 16-byte copies: rows
// behind N and bytes behind K are zeros without being read.
//
// Promises: a row's result does not depend on M, on the rows beside it, nor on how x is aligned; the same bits every
// time. (Tiles of x have 8 to 128 rows; that the tensor core adds up alike in all of them is Hopper's promise.)
#include <atomic>

#include "linear4_hopper.h"
#include "linear4_hopper_block.cuh"

namespace hb {

namespace {

// --- x in the order of tensor cores ----------------------------------------------------------------------------------

// The image: [tiles of rows][tiles of K][rows of a tile] of 128 bytes, swizzled; zeros behind M and behind K. A thread
// turns 32 values of a row, four by four pairs, over the diagonal.
template <typename T>
__global__ void arrange_x(const T* x, bool aligned, int64_t M, int64_t K, int64_t tokens, int64_t rows,
                          unsigned char* image) {
    successors_may_start();
    const int64_t k_tiles = (K + kStageValues - 1) / kStageValues * (kStageValues / kTileValues);
    const int64_t parts = k_tiles * (kTileValues / kOrdered);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kAddingThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAddingThreads + threadIdx.x; i < rows * parts; i += stride) {
        const int64_t row = i / parts, part = i % parts;
        unsigned pairs[4][4] = {};
        if (row < M && part * kOrdered < K) {
            const T* const from = x + row * K + part * kOrdered;
            if (aligned) {
                memcpy(pairs, __builtin_assume_aligned(from, kPieceBytes), sizeof pairs);
            } else {
                T values[kOrdered];
                for (int v = 0; v < kOrdered; ++v) values[v] = from[v];
                memcpy(pairs, values, sizeof pairs);
            }
        }
        const int within = static_cast<int>(row % tokens);
        unsigned char* const to = image + ((row / tokens * k_tiles + part / 2) * tokens + within) * kSwizzledRow;
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            const uint4 turned = {pairs[0][piece], pairs[1][piece], pairs[2][piece], pairs[3][piece]};
            *reinterpret_cast<uint4*>(to + swizzled(within, static_cast<int>(part % 2) * 4 + piece)) = turned;
        }
    }
}

// --- the product -----------------------------------------------------------------------------------------------------

// Neighbouring blocks have the same rows of W and different ones of x: W comes from memory once, x from the cache. The
// empty kernel for other architectures cannot be launched: it has room for one warp.
template <typename T, int Tokens, int Scaled, int Stages, int Blocks>
__global__ void __launch_bounds__(kHopper ? kThreads : kWarp, Blocks) linear4_hopper(HopperProblem p) {
    if constexpr (kHopper) {
        using Kernel = HopperBlock<T, Tokens, Scaled, Stages>;
        static_assert(Blocks * (Kernel::kSharedBytes + kSystemSharedBytes) <= kHopperSharedBytes, "blocks must fit");
        const int64_t tile = blockIdx.x % p.tiles;
        const int slice = static_cast<int>(blockIdx.x / p.tiles);
        Kernel block = {p, tile / p.token_tiles * kRows, tile % p.token_tiles, tiles_memory()};
        block.begin_barriers();
        const int stages = static_cast<int>((p.K + kStageValues - 1) / kStageValues);
        const int begin = slice * p.slice_stages;
        const int slice_end = begin + p.slice_stages;
        const int end = p.outputs.slices != nullptr && slice_end < stages ? slice_end : stages;
        // Registers go from those who copy to those who multiply.
        if (threadIdx.x >= kConsumerThreads) {
            release_registers<Blocks == 1 ? 56 : 48>();
            typename Kernel::Producer producer(block, static_cast<int>(threadIdx.x) - kConsumerThreads);
            producer.run(begin, end);
        } else {
            claim_registers<Blocks == 1 ? 224 : 96>();
            const int group_row = static_cast<int>(threadIdx.x) / kWarpgroup * 64;
            typename Kernel::Consumer consumer = {
                block, group_row, {}, {}, {}, {}, kept(static_cast<unsigned>(lane()) * 4u)};
            consumer.run(slice, end - begin);
        }
    }
}

// --- launching -------------------------------------------------------------------------------------------------------

template <typename T, int Tokens, int Stages, int Blocks>
void launch_tile(const HopperProblem& problem, bool small_blocks, unsigned blocks, cudaStream_t stream) {
    if (small_blocks) {
        constexpr int bytes = HopperBlock<T, Tokens, 32, Stages>::kSharedBytes;
        launch_behind(linear4_hopper<T, Tokens, 32, Stages, Blocks>, blocks, kThreads, bytes, stream, problem);
    } else {
        constexpr int bytes = HopperBlock<T, Tokens, 64, Stages>::kSharedBytes;
        launch_behind(linear4_hopper<T, Tokens, 64, Stages, Blocks>, blocks, kThreads, bytes, stream, problem);
    }
}

template <typename T>
void launch_panel(const hb_linear4_args& a, const T* x, int64_t M, T* out) {
    const HopperPlan plan = plan_hopper(M, a.N, a.K);
    const cudaStream_t stream = stream_of(a.call);
    unsigned char* const image = static_cast<unsigned char*>(a.call.workspace);
    float* const slices = plan.cut.apart ? reinterpret_cast<float*>(image + plan.image_bytes) : nullptr;
    HopperProblem problem = {};
    problem.image = image;
    problem.codes = Rows(a.packed, a.N, a.K / 2);
    problem.scales = Scales(a);
    problem.K = a.K;
    problem.format = a.format;
    problem.lift = lift_of(a.format, a.x_dtype);
    problem.outputs = Outputs{M, a.N, nullptr, 1 / problem.lift, a.bias, a.bias_dtype, out, a.N, slices};
    problem.slice_stages = static_cast<int>(plan.cut.slice_values / kStageValues);
    problem.token_tiles = plan.cut.token_tiles;
    problem.tiles = plan.cut.tiles;

    const bool aligned = reinterpret_cast<uintptr_t>(x) % kPieceBytes == 0;
    const int64_t rows = round_up(M, plan.tokens);
    launch(arrange_x<T>, blocks_for_adding(plan.image_bytes / (kOrdered * 2)), kAddingThreads, 0, stream, x, aligned, M,
           a.K, plan.tokens, rows, image);
    with_number<count_of(kTilesOfHopper)>(plan.cut.tile, [&](auto number) {
        constexpr MatmulTile tile = kTilesOfHopper[decltype(number)::value];
        launch_tile<T, tile.tokens, tile.stages, tile.beside>(problem, a.blocksize < kTileValues, plan.cut.blocks(),
                                                              stream);
    });
    if (!plan.cut.apart) return;
    launch_behind(add_slices<T>, blocks_for_adding(M * a.N), kAddingThreads, 0, stream, problem.outputs,
                  plan.cut.slices);
}

template <typename T>
void launch_panels(const hb_linear4_args& a) {
    for (int64_t first = 0; first < a.M; first += kHopperPanelRows) {
        const int64_t rows = a.M - first < kHopperPanelRows ? a.M - first : kHopperPanelRows;
        launch_panel(a, static_cast<const T*>(a.x) + first * a.K, rows, static_cast<T*>(a.out) + first * a.N);
    }
}

}  // namespace

// What a device can do stays as it is: it is asked once, not in every call.
hb_status check_hopper() {
    constexpr int devices = 64;  // others are asked each time
    constexpr signed char unknown = 0, yes = 1, no = 2;
    static std::atomic<signed char> answers[devices];
    int device = 0;
    const cudaError_t found = cudaGetDevice(&device);
    if (found != cudaSuccess) {
        cudaGetLastError();  // the next launch's status is its own
        return status_of(found);
    }
    std::atomic<signed char>* const answer = device < devices ? &answers[device] : nullptr;
    const signed char known = answer == nullptr ? unknown : answer->load(std::memory_order_relaxed);
    if (known != unknown) return fail_unless(known == yes, HB_NO_KERNEL);
    const hb_status status = check_kernel(linear4_hopper<__half, 8, 64, 6, 2>, kThreads);
    if (answer != nullptr && (status == HB_OK || status == HB_NO_KERNEL)) {
        answer->store(status == HB_OK ? yes : no, std::memory_order_relaxed);
    }
    return status;
}

void launch_linear4_hopper(const hb_linear4_args& a) {
    if (a.x_dtype == HB_FLOAT16) {
        launch_panels<__half>(a);
    } else {
        launch_panels<__nv_bfloat16>(a);
    }
}

}  // namespace hb
