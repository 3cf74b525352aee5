// LLM.int8() takes x apart: for each row the largest ordinary value, int8 codes of the ordinary values with zeros for
// outliers, and a bit for each outlier.
//
//     split_rows     one block per row, twice over it: the maximum and the bits, then the codes
//     mark_rows      for the batch rule, before that: the bits alone
//     join_rows      for the batch rule, between the two: one warp per word of bits, over all rows
//
// A thread takes eight values at a time: eight bits, eight codes. The second time over a row it is in the cache.
#include "int8.cuh"
#include "linear8.h"
#include "linear8_stages.cuh"

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

__global__ void join_rows(int64_t M, SplitRows rows) {
    const int64_t words = rows.stride / kWordColumns;
    for (int64_t word = warp_index(); word < words; word += warp_count()) {
        unsigned any = 0;
        for (int64_t row = lane(); row < M; row += kWarp) any |= rows.masks[row * words + word];
        any = __reduce_or_sync(kAllLanes, any);
        if (lane() == 0) rows.joined[word] = any;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) split_rows(Values<T> x, SplitRows rows) {
    unsigned* const room = reinterpret_cast<unsigned*>(shared_memory());
    const int64_t pieces = rows.stride / kTogether;
    uint8_t* const masks = reinterpret_cast<uint8_t*>(rows.masks);
    const uint8_t* const joined = reinterpret_cast<const uint8_t*>(rows.joined);
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
            if (masks != nullptr && joined == nullptr) masks[row * pieces + piece] = static_cast<uint8_t>(by_value);
            found |= joined == nullptr ? by_value : joined[piece];
        }
        const float absmax = __uint_as_float(largest_in_block(largest, room));
        const unsigned any = largest_in_block(found, room + kThreads / kWarp);
        const float factor = int8_factor(absmax);
        for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
            float values[kTogether];
            x.load(row, piece * kTogether, values);
            const unsigned outliers = joined == nullptr ? outliers_among(values, rows.threshold) : joined[piece];
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

template <typename T>
void launch_for(const hb_linear8_args& a, const SplitRows& rows) {
    const cudaStream_t stream = stream_of(a.call);
    const Values<T> x = {static_cast<const T*>(a.x), a.M, a.K, Rows(a.x, a.M, a.K * dtype_bytes(a.x_dtype)).aligned};
    constexpr int warps = kThreads / kWarp;
    if (rows.joined != nullptr) {
        const int64_t pieces = a.M * rows.stride / kTogether;
        launch(mark_rows<T>, blocks_for_warps(ceil_div(pieces, kWarp)), kWarpsPerBlock * kWarp, 0, stream, x, rows);
        launch(join_rows, blocks_for_warps(rows.stride / kWordColumns), kWarpsPerBlock * kWarp, 0, stream, a.M, rows);
    }
    const unsigned blocks = static_cast<unsigned>(a.M < kMostBlocks ? a.M : kMostBlocks);
    launch(split_rows<T>, blocks, kThreads, 2 * warps * 4, stream, x, rows);
}

}  // namespace

void launch_split(const hb_linear8_args& a, const SplitRows& rows) {
    with_dtype(a.x_dtype, [&](auto type) { launch_for<decltype(type)>(a, rows); });
}

}  // namespace hb
