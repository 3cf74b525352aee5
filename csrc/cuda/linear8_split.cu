// LLM.int8() takes x apart: for each row the largest ordinary value, int8 codes of the ordinary values with zeros for
// outliers, and a bit for each outlier.
//
//     split_rows     one block per row, twice over it: the maximum and the bits, then the codes
//     mark_rows      for the batch rule, before that: the bits alone
//     join_rows      for the batch rule, between the two: gives the rows of an owner, an expert or everyone, the bits
//     of
//                    all of them, one warp per owner and word of bits
//
// A thread takes eight values at a time: eight bits, eight codes. The second time over a row it is in the cache.
#include "experts.cuh"
#include "int8.cuh"
#include "linear8.h"
#include "tile_stages.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 8;  // values of a row

template <typename T>
struct Values {
    const T* x;
    int64_t M, K;
    bool aligned;  // every row, to kPieceBytes

    // Zeros behind K.
    __device__ void load(int64_t row, int64_t k, float (&values)[kTogether]) const {
        alignas(kPieceBytes) T own[kTogether];
        const T* const from = x + row * K + k;
        const bool whole = k + kTogether <= K;
        if (aligned && whole) {
            constexpr int pieces = static_cast<int>(sizeof own) / kPieceBytes;
#pragma unroll
            for (int i = 0; i < pieces; ++i) {
                reinterpret_cast<uint4*>(own)[i] = reinterpret_cast<const uint4*>(from)[i];
            }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (!aligned || !whole) own[i] = k + i < K ? from[i] : from_float<T>(0.0f);
            values[i] = to_float(own[i]);
        }
    }
};

// Bit i says whether value i is an outlier by itself.
__device__ unsigned outliers_among(const float (&values)[kTogether], float threshold) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) bits |= fabsf(values[i]) >= threshold ? 1u << i : 0u;
    return bits;
}

template <typename T>
__global__ void mark_rows(Values<T> x, SplitRows rows) {
    const int64_t pieces = rows.stride / kTogether;
    uint8_t* const masks = reinterpret_cast<uint8_t*>(rows.masks);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < x.M * pieces; i += stride) {
        float values[kTogether];
        x.load(i / pieces, i % pieces * kTogether, values);
        masks[i] = static_cast<uint8_t>(outliers_among(values, rows.threshold));
    }
}

__global__ void join_rows(ExpertRows owners, SplitRows rows) {
    const int64_t words = rows.stride / kWordColumns;
    for (int64_t task = warp_index(); task < (owners.count + 1) * words; task += warp_count()) {
        const int64_t owner = task / words, end = owners.end(owner);
        unsigned* const masks = rows.masks + task % words;
        unsigned any = 0;
        for (int64_t row = owners.end(owner - 1) + lane(); row < end; row += kWarp) any |= masks[row * words];
        any = __reduce_or_sync(kAllLanes, any);
        for (int64_t row = owners.end(owner - 1) + lane(); row < end; row += kWarp) masks[row * words] = any;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) split_rows(Values<T> x, SplitRows rows) {
    unsigned* const room = reinterpret_cast<unsigned*>(shared_memory());
    const int64_t pieces = rows.stride / kTogether;
    uint8_t* const masks = reinterpret_cast<uint8_t*>(rows.masks);
    for (int64_t row = blockIdx.x; row < x.M; row += gridDim.x) {
        // Ordinary values in an outlier column still count for the maximum, as in bitsandbytes.
        unsigned largest = 0, found = 0;
        for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
            float values[kTogether];
            x.load(row, piece * kTogether, values);
            const unsigned by_value = outliers_among(values, rows.threshold);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if ((by_value >> i & 1u) == 0) largest = max(largest, magnitude_bits(values[i]));
            }
            if (masks != nullptr && !rows.by_column) masks[row * pieces + piece] = static_cast<uint8_t>(by_value);
            found |= rows.by_column ? masks[row * pieces + piece] : by_value;
        }
        const float absmax = __uint_as_float(largest_in_block(largest, room));
        const unsigned any = largest_in_block(found, room + kThreads / kWarp);
        const float factor = int8_factor(absmax);
        for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
            float values[kTogether];
            x.load(row, piece * kTogether, values);
            const unsigned outliers =
                rows.by_column ? masks[row * pieces + piece] : outliers_among(values, rows.threshold);
            alignas(kTogether) int8_t codes[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                codes[i] = (outliers >> i & 1u) != 0 ? static_cast<int8_t>(0) : int8_code(values[i], factor);
            }
            *reinterpret_cast<uint2*>(rows.codes + row * rows.stride + piece * kTogether) =
                *reinterpret_cast<const uint2*>(codes);
        }
        if (threadIdx.x != 0) continue;
        rows.absmax[row] = absmax;
        if (rows.found != nullptr) rows.found[row] = any != 0 ? 1 : 0;
    }
}

template <typename T, typename Args>
void launch_for(const Args& a, const ExpertRows& owners, const SplitRows& rows) {
    const cudaStream_t stream = stream_of(a.call);
    const Values<T> x = {static_cast<const T*>(a.x), a.M, a.K, Rows(a.x, a.M, a.K * dtype_bytes(a.x_dtype)).aligned};
    constexpr int warps = kThreads / kWarp;
    if (rows.by_column) {
        const int64_t pieces = a.M * rows.stride / kTogether;
        launch(mark_rows<T>, blocks_for_warps(ceil_div(pieces, kWarp)), kWarpsPerBlock * kWarp, 0, stream, x, rows);
        launch(join_rows, blocks_for_warps((owners.count + 1) * rows.stride / kWordColumns), kWarpsPerBlock * kWarp, 0,
               stream, owners, rows);
    }
    const unsigned blocks = static_cast<unsigned>(a.M < kMostBlocks ? a.M : kMostBlocks);
    launch(split_rows<T>, blocks, kThreads, 2 * warps * 4, stream, x, rows);
}

}  // namespace

void launch_split(const hb_linear8_args& a, const SplitRows& rows) {
    const ExpertRows everyone = {nullptr, 0, a.M};
    with_dtype(a.x_dtype, [&](auto type) { launch_for<decltype(type)>(a, everyone, rows); });
}

void launch_split(const hb_linear8_experts_args& a, const SplitRows& rows) {
    const ExpertRows experts = {a.ends, a.E, a.M};
    with_dtype(a.x_dtype, [&](auto type) { launch_for<decltype(type)>(a, experts, rows); });
}

}  // namespace hb
