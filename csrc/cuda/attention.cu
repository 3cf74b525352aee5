// Attention over a paged cache: the entry, the kernel that puts a row's parts together, and the one that makes parts of
// any dtype and size of head. Heads of 16-bit values in common sizes are attention_mma.cu's.
//
//     attention_plan.h   rows in turns, spans of 256 keys, thread blocks
//     a part             slots of the span -> scores -> softmax against the span's maximum -> weighted values
//     join               parts in order, the head's sink, division, one rounding
//
// Here a warp makes the part of one head: a lane has eight of the span's keys, and then every 32nd value of the output.
// It reads keys as they come; what four heads of a block have in common comes from the cache. Sums are float32, in an
// order that depends on nothing but a key's place in its span. Codes in int8 are values like others; a key's scale goes
// on its product, a value's on its weight, once that has been counted.
#include "attention.cuh"
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = kWarpsPerBlock * kWarp;
constexpr int kLaneKeys = kSpanKeys / kWarp;
constexpr int kLaneValues = kThreads / kWarp;  // of a chunk of the output
static_assert(kPlainHeads == kWarpsPerBlock, "a warp has a head");

struct Shared {
    int64_t slots[kSpanKeys];
    float weights[kWarpsPerBlock][kSpanKeys];
};

template <typename T, typename S>
__device__ float product(const T* query, const S* key, int64_t D) {
    float sum = 0;
    for (int64_t d = 0; d < D; ++d) sum = __fmaf_rn(to_float(query[d]), to_float(key[d]), sum);
    return sum;
}

// Weights of this warp's head to shared memory, their maximum and sum to the workspace.
template <typename T, typename S>
__device__ void weigh(const hb_paged_attention_args& a, const Scoring& scoring, int64_t row, int64_t head,
                      const int64_t* slots, float* weights, float* part_maximum, float* part_sum) {
    const T* const query = static_cast<const T*>(a.query) + row * a.query_row_stride + head * a.query_head_stride;
    const int64_t kv_head = head / (a.H / a.G);
    const S* const keys = static_cast<const S*>(a.keys) + kv_head * a.D;
    float scores[kLaneKeys], factors[kLaneKeys];
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
        const int64_t slot = slots[i * kWarp + lane()];
        const float2 scales = scales_at(a, slot, kv_head);
        const float sum = slot < 0 ? 0.0f : __fmul_rn(product(query, keys + slot * a.G * a.D, a.D), scales.x);
        scores[i] = scoring(sum, slot);
        factors[i] = scales.y;
        maximum = fmaxf(maximum, scores[i]);
    }
    maximum = maximum_among<kWarp>(maximum);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
        scores[i] = exp2f(scores[i] - finite_maximum(maximum));
        sum += scores[i];
    }
    sum = sum_among<kWarp>(sum);
    for (int i = 0; i < kLaneKeys; ++i) weights[i * kWarp + lane()] = __fmul_rn(scores[i], factors[i]);
    if (lane() == 0) *part_maximum = maximum, *part_sum = sum;
}

template <typename S>
__device__ void add_values(const hb_paged_attention_args& a, int64_t head, const int64_t* slots, const float* weights,
                           float* outputs) {
    const S* const values = static_cast<const S*>(a.values) + head / (a.H / a.G) * a.E;
    for (int64_t e = lane(); e < a.E; e += kWarp) {
        float sum = 0;
        for (int i = 0; i < kSpanKeys; ++i) {
            if (slots[i] == kUnseen) continue;
            const float value = slots[i] < 0 ? 0.0f : to_float(values[slots[i] * a.G * a.E + e]);
            sum = __fmaf_rn(weights[i], value, sum);
        }
        outputs[e] = sum;
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    make_parts(hb_paged_attention_args a, Scoring scoring, Parts parts, int64_t tiles, int64_t splits) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const Share share(parts, tiles, splits);
    const Row row = find_row(a, share.row);
    if (row.sequence < 0) return;
    const int64_t warp = threadIdx.x / kWarp;
    const int64_t head = share.tile * kPlainHeads + warp;
    for (int64_t span = row.first_span() + share.split; span <= row.last_span(); span += splits) {
        const int64_t vector = parts.vector(span, share.row, head, a.H);
        find_slots(a, row, span, shared.slots);
        block_barrier();
        if (head < a.H) {
            weigh<T, S>(a, scoring, share.row, head, shared.slots, shared.weights[warp], parts.maxima + vector,
                        parts.sums + vector);
        }
        block_barrier();
        if (head < a.H) add_values<S>(a, head, shared.slots, shared.weights[warp], parts.outputs + vector * a.E);
        block_barrier();
    }
}

struct Joined {
    float weights[kWarpsPerBlock];
    float outputs[kWarpsPerBlock][kLaneValues * kWarp];
};

// A block has one head of one row. Each warp adds up every fourth part, then the four sums are added, always in the
// same order; of a chunk of the output, a lane has every 32nd value.
template <typename T>
__global__ void __launch_bounds__(kThreads) join(hb_paged_attention_args a, Parts parts) {
    Joined& shared = *reinterpret_cast<Joined*>(shared_memory());
    const int64_t row = parts.first_row + blockIdx.x / a.H, head = blockIdx.x % a.H;
    const Row place = find_row(a, row);
    const int64_t begin = place.first_span(), end = place.last_span() + 1;
    const auto vector_of = [&](int64_t span) { return parts.vector(span, row, head, a.H); };
    const float sink = a.sinks == nullptr ? -INFINITY : load_float(a.sinks, a.sinks_dtype, head) * kLog2E;
    float maximum = sink;
    for (int64_t span = begin + lane(); span < end; span += kWarp) {
        maximum = fmaxf(maximum, parts.maxima[vector_of(span)]);
    }
    maximum = maximum_among<kWarp>(maximum);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t first = begin + (warp - begin % kWarpsPerBlock + kWarpsPerBlock) % kWarpsPerBlock;
    for (int64_t chunk = 0; chunk < a.E; chunk += kLaneValues * kWarp) {
        float weights = 0, sums[kLaneValues] = {};
#pragma unroll 4
        for (int64_t span = first; span < end; span += kWarpsPerBlock) {
            const int64_t vector = vector_of(span);
            const float factor = exp2f(parts.maxima[vector] - maximum);
            weights = __fmaf_rn(parts.sums[vector], factor, weights);
#pragma unroll
            for (int i = 0; i < kLaneValues; ++i) {
                const int64_t e = chunk + i * kWarp + lane();
                if (e < a.E) sums[i] = __fmaf_rn(parts.outputs[vector * a.E + e], factor, sums[i]);
            }
        }
        shared.weights[warp] = weights;
        for (int i = 0; i < kLaneValues; ++i) shared.outputs[warp][i * kWarp + lane()] = sums[i];
        block_barrier();
        const int64_t e = chunk + threadIdx.x;
        float weight = a.sinks == nullptr ? 0.0f : exp2f(sink - maximum), sum = 0;
        for (int w = 0; w < kWarpsPerBlock; ++w) {
            weight += shared.weights[w];
            sum += shared.outputs[w][threadIdx.x];
        }
        const float value = place.sequence < 0 ? NAN : __fdiv_rn(sum, weight);
        if (e < a.E) static_cast<T*>(a.out)[(row * a.H + head) * a.E + e] = from_float<T>(value);
        block_barrier();
    }
}

// Calls run(a value of the type) that a cache's dtype names.
template <typename Run>
void with_store(int64_t dtype, Run run) {
    if (dtype == HB_INT8) {
        run(int8_t{});
    } else {
        with_dtype(dtype, run);
    }
}

// Some rows, from `first_row` on.
template <typename T>
void attend(const hb_paged_attention_args& a, const AttentionPlan& plan, int64_t first_row) {
    const Parts parts(a, plan, first_row);
    if (on_tensor_cores(a)) {
        launch_attention_mma(a, plan, parts);
    } else {
        const int64_t tiles = ceil_div(a.H, kPlainHeads), splits = plan.splits(tiles);
        with_store(a.store_dtype, [&](auto store) {
            launch(make_parts<T, decltype(store)>, static_cast<unsigned>(parts.rows * tiles * splits), kThreads,
                   sizeof(Shared), stream_of(a.call), a, Scoring(a), parts, tiles, splits);
        });
    }
    launch(join<T>, static_cast<unsigned>(parts.rows * a.H), kThreads, sizeof(Joined), stream_of(a.call), a, parts);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_paged_attention_workspace(const hb_paged_attention_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_attention_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    AttentionPlan plan = {};
    HB_REQUIRE(plan_attention(*args, &plan));
    *bytes = plan.workspace_bytes(*args);
    return HB_OK;
}

extern "C" hb_status hb_paged_attention(const hb_paged_attention_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_paged_attention_args& a = *args;
    HB_REQUIRE(fail_unless(a.T == 0 || a.S > 0, HB_BAD_SEQUENCE));
    AttentionPlan plan = {};
    HB_REQUIRE(plan_attention(a, &plan));
    HB_REQUIRE(check_workspace(a.call, plan.workspace_bytes(a)));
    with_dtype(a.dtype, [&](auto type) {
        for (int64_t row = 0; row < a.T; row += plan.rows) attend<decltype(type)>(a, plan, row);
    });
    return a.T == 0 ? HB_OK : launched();
}
