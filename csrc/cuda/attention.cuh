// What the kernels of attention share: where a row stands, where its keys are, the parts in the workspace. No kernels.
//
// Offsets, starts and tables are read on the device alone, where nobody can be told that they are wrong: a row that no
// sequence has, or that stands outside its table, and a row that sees a block that the cache does not have, become NaN.
// No such block is read.
#pragma once

#include "attention_plan.h"
#include "vocabulary.cuh"

namespace hb {

constexpr float kLog2E = 0x1.715476p+0f;
// Instead of a slot of the cache: a position that the row does not see, and one whose block does not exist.
constexpr int64_t kUnseen = -1;
constexpr int64_t kMissing = -2;

// A row of the batch. It sees the positions first .. position of its sequence; where it has none, that is -1 and there
// are no spans.
struct Row {
    int64_t sequence;
    int64_t first;
    int64_t position;

    __device__ int64_t first_span() const { return first / kSpanKeys; }
    __device__ int64_t last_span() const { return position / kSpanKeys; }
};

__device__ inline Row find_row(const hb_paged_attention_args& a, int64_t row) {
    int64_t sequence = 0;  // the last one whose offset is not behind the row
    for (int64_t end = a.S; end - sequence > 1;) {
        const int64_t middle = sequence + (end - sequence) / 2;
        if (a.offsets[middle] <= row) {
            sequence = middle;
        } else {
            end = middle;
        }
    }
    const int64_t inside = row - a.offsets[sequence], start = a.starts[sequence];
    const int64_t capacity = a.max_blocks * a.block_tokens;
    const bool is_in_sequence = inside >= 0 && row < a.offsets[sequence + 1];
    if (!is_in_sequence || start < 0 || start > capacity || inside >= capacity - start) return {-1, 0, -kSpanKeys};
    const int64_t position = start + inside;
    return {sequence, a.window == 0 || position < a.window ? 0 : position - a.window + 1, position};
}

// Where the keys of a span are, for all threads behind the next barrier: block * block_tokens + place.
__device__ inline void find_slots(const hb_paged_attention_args& a, const Row& row, int64_t span, int64_t* slots) {
    for (int i = static_cast<int>(threadIdx.x); i < kSpanKeys; i += static_cast<int>(blockDim.x)) {
        const int64_t position = span * kSpanKeys + i;
        slots[i] = kUnseen;
        if (position < row.first || position > row.position) continue;
        const int64_t block = a.tables[row.sequence * a.max_blocks + position / a.block_tokens];
        slots[i] = block < 0 || block >= a.blocks ? kMissing : block * a.block_tokens + position % a.block_tokens;
    }
}

// The scales of one position's key and value; none has 1 and 1. A missing block's are never asked for: its score is
// NaN.
__device__ inline float2 scales_at(const hb_paged_attention_args& a, int64_t slot, int64_t kv_head) {
    if (a.store_dtype != HB_INT8) return {1.0f, 1.0f};
    if (slot < 0) return {0.0f, 0.0f};
    const float* const both = a.scales + (slot * a.G + kv_head) * 2;
    return {both[0], both[1]};
}

// Products of query and key -> scores in powers of two.
struct Scoring {
    float scale;
    float cap;  // 0: none

    explicit Scoring(const hb_paged_attention_args& a)
        : scale(static_cast<float>(a.softcap == 0 ? a.scale * static_cast<double>(kLog2E) : a.scale / a.softcap)),
          cap(static_cast<float>(a.softcap) * kLog2E) {}

    __device__ float operator()(float product, int64_t slot) const {
        if (slot < 0) return slot == kUnseen ? -INFINITY : NAN;
        const float scaled = __fmul_rn(product, scale);
        return cap == 0 ? scaled : __fmul_rn(tanhf(scaled), cap);
    }
};

// What scores are taken away from: where nothing is seen, no difference with the maximum has a meaning.
__device__ inline float finite_maximum(float maximum) {
    return maximum == -INFINITY ? 0.0f : maximum;
}

// Over neighbouring lanes, each of which gets the result: the first as fmaxf has it, which passes over NaN.
template <int Lanes>
__device__ float maximum_among(float value) {
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}
template <int Lanes>
__device__ float sum_among(float value) {
    for (int distance = Lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
}

// The parts of some rows in the workspace.
struct Parts {
    float* maxima;   // [spans, rows, H]
    float* sums;     // [spans, rows, H] of 2^(score - maximum)
    float* outputs;  // [spans, rows, H, E] of the same times values
    int64_t first_row;
    int64_t rows;

    Parts(const hb_paged_attention_args& a, const AttentionPlan& plan, int64_t first)
        : maxima(static_cast<float*>(a.call.workspace)),
          sums(maxima + round_up(plan.vectors(a), 8)),
          outputs(sums + round_up(plan.vectors(a), 8)),
          first_row(first),
          rows(plan.rows < a.T - first ? plan.rows : a.T - first) {}

    __device__ int64_t vector(int64_t span, int64_t row, int64_t head, int64_t heads) const {
        return (span * rows + row - first_row) * heads + head;
    }
};

// A thread block's share: neighbouring blocks have the heads of one row and the same spans, whose keys lie side by
// side.
struct Share {
    int64_t row;
    int64_t tile;   // of the row's heads
    int64_t split;  // takes the row's spans split, split + splits, ...
    int64_t splits;

    __device__ Share(const Parts& parts, int64_t tiles, int64_t all_splits)
        : row(parts.first_row + blockIdx.x / tiles / all_splits),
          tile(blockIdx.x % tiles),
          split(blockIdx.x / tiles % all_splits),
          splits(all_splits) {}
};

// Launches the tensor-core kernel (attention_mma.cu) for a checked call that on_tensor_cores has.
void launch_attention_mma(const hb_paged_attention_args& a, const AttentionPlan& plan, const Parts& parts);

}  // namespace hb
