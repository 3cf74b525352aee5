// Parts of attention over a paged cache on tensor cores (sm_80 and later): 16-bit values, heads of up to 256 in eights.
//
// A thread block has up to 16 query heads of one kv head, so that their keys and values are read once; each of its four
// warps has 64 of a span's 256 keys, from scores to weighted values, and the four results are put together at the end.
// Keys and values go straight from the cache into the registers that the tensor core reads them from. No copy in shared
// memory and no barrier stands between, because both products leave an order free:
//
//     scores   queries (16 heads x D) * keys (D x 8)        in which order D is added up, as long as both agree
//              lane t of each four takes 8 neighbouring values of every 32, 16 bytes:
//              step j of two:  the tensor core's columns 2t, 2t+1, 2t+8, 2t+9  are  d = 8t + 4j + 0, 1, 2, 3
//     outputs  weights (16 heads x 16 keys) * values (16 x 8)     which eight columns of E are multiplied together
//              lane g of each eight takes 8 neighbouring values of every 64, 16 bytes, of four keys:
//              product j of eight:  column g  is  e = 8g + j
//
// What the tensor core gives as scores lies in the lanes where it takes weights as an operand. Weights are rounded to
// the dtype and then added up, so that their sum is that of what is multiplied. Bits depend on a key's place in its
// span and on nothing else.
//
// A cache in int8: eight values are 8 bytes, which become the same registers, codes as values of the dtype. A product's
// sum is multiplied with its key's scale. Weights are counted in float32, and multiplied then with their values' scales
// in units of the largest of a warp's, so that float16 holds the products; the outputs are multiplied with that in the
// end.
#include "attention.cuh"
#include "int8.cuh"
#include "pieces.cuh"
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = kWarpsPerBlock * kWarp;
constexpr int kHeads = static_cast<int>(kHeadTile);
constexpr int kWarpKeys = kSpanKeys / kWarpsPerBlock;
constexpr int kTileKeys = 16;
constexpr int kTiles = kWarpKeys / kTileKeys;
constexpr int kKeyChunk = 32;    // values of a key that four lanes read at once
constexpr int kValueChunk = 64;  // values of a value that eight lanes read at once

template <bool IsInt8, int KeyChunks, int ValueChunks>
struct Shared {
    uint4 queries[KeyChunks * 2][kWarp];  // by step and lane: the tensor core's left operand
    int64_t slots[kSpanKeys];
    float2 scales[IsInt8 ? kSpanKeys : 1];  // of keys and values
    float maxima[kWarpsPerBlock][kHeads];
    float sums[kWarpsPerBlock][kHeads];
    float outputs[kWarpsPerBlock][ValueChunks][4][8][kWarp];  // by value of a fragment, product, lane
};

template <typename T, typename S, int KeyChunks, int ValueChunks>
struct Attention {
    static constexpr bool kIsInt8 = std::is_same<S, int8_t>::value;
    using Memory = Shared<kIsInt8, KeyChunks, ValueChunks>;

    const hb_paged_attention_args& a;
    const Scoring& scoring;
    Memory& shared;
    int64_t row;
    int64_t first_head;  // of this block
    int64_t heads;       // of this block
    int64_t kv_head;
    int64_t begin, end;  // of the span's keys that the row sees
    unsigned weights[kTiles][4];
    float outputs[ValueChunks][8][4];
    float unit = 1.0f;  // what outputs count, in int8

    __device__ int warp() const { return static_cast<int>(threadIdx.x) / kWarp; }
    __device__ int group() const { return lane() / 4; }
    __device__ int member() const { return lane() % 4; }
    // The first of the span's keys in a tile of this warp's.
    __device__ int place_of(int tile) const { return warp() * kWarpKeys + tile * kTileKeys; }

    __device__ bool sees(int tile) const { return place_of(tile) < end && place_of(tile) + kTileKeys > begin; }

    __device__ unsigned query_pair(int head, int d) const {
        if (head >= heads || d >= a.D) return 0;
        const T* const query = static_cast<const T*>(a.query) + row * a.query_row_stride;
        const T* const from = query + (first_head + head) * a.query_head_stride + d;
        return pair_of<T>(to_float(from[0]), to_float(from[1]));
    }

    __device__ void arrange_queries() {
        for (int i = static_cast<int>(threadIdx.x); i < KeyChunks * 2 * kWarp; i += kThreads) {
            const int step = i / kWarp, head = i % kWarp / 4;
            const int d = step / 2 * kKeyChunk + i % 4 * 8 + step % 2 * 4;
            shared.queries[step][i % kWarp] = {query_pair(head, d), query_pair(head + 8, d), query_pair(head, d + 2),
                                               query_pair(head + 8, d + 2)};
        }
    }

    // Eight of one position's key or value, zeros where there is none.
    __device__ uint4 read(const void* store, int64_t slot, int64_t size, int at) const {
        if (slot < 0 || at >= size) return {0, 0, 0, 0};
        const S* const values = static_cast<const S*>(store) + (slot * a.G + kv_head) * size + at;
        if constexpr (kIsInt8) {
            const uint2 codes = *reinterpret_cast<const uint2*>(values);
            return {pair_of_codes<T, 0>(codes.x), pair_of_codes<T, 1>(codes.x), pair_of_codes<T, 0>(codes.y),
                    pair_of_codes<T, 1>(codes.y)};
        } else {
            return *reinterpret_cast<const uint4*>(values);
        }
    }

    // The scales of the span's keys and values, for all threads behind the next barrier, in the turn of find_slots: a
    // thread asks for the slots that it has found itself.
    __device__ void find_scales() const {
        for (int i = static_cast<int>(threadIdx.x); kIsInt8 && i < kSpanKeys; i += kThreads) {
            shared.scales[i] = scales_at(a, shared.slots[i], kv_head);
        }
    }

    // Of this lane's score i of a tile: the key's place in the span.
    __device__ int key_of(int tile, int i) const { return place_of(tile) + i / 4 * 8 + member() * 2 + i % 2; }

    // The largest scale of this warp's values; 1 where there is none.
    __device__ void find_unit() {
        float largest = 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) largest = fmaxf(largest, shared.scales[key_of(tile, i)].y);
        }
        largest = maximum_among<4>(largest);
        unit = largest > 0 ? largest : 1.0f;
    }

    // The products of 16 keys, eight at a time, with all heads.
    __device__ void multiply_keys(int tile, float (&products)[2][4]) const {
        uint4 keys[2][KeyChunks];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int64_t slot = shared.slots[place_of(tile) + n * 8 + group()];
#pragma unroll
            for (int c = 0; c < KeyChunks; ++c) keys[n][c] = read(a.keys, slot, a.D, c * kKeyChunk + member() * 8);
        }
#pragma unroll
        for (int c = 0; c < KeyChunks; ++c) {
            if (c * kKeyChunk >= a.D) break;
            const uint4 near = shared.queries[c * 2][lane()], far = shared.queries[c * 2 + 1][lane()];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                multiply_tiles<T>(products[n], {near.x, near.y, near.z, near.w}, {keys[n][c].x, keys[n][c].y});
                multiply_tiles<T>(products[n], {far.x, far.y, far.z, far.w}, {keys[n][c].z, keys[n][c].w});
            }
        }
    }

    // Of 64 keys: scores, their maximum, weights, and the weights' sum. Of four values of a fragment, the first two are
    // of head g, the others of head g + 8.
    __device__ void weigh() {
        float scores[kTiles][2][4] = {};
        float maxima[2] = {-INFINITY, -INFINITY}, sums[2] = {};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (sees(tile)) multiply_keys(tile, scores[tile]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& score = scores[tile][i / 4][i % 4];
                if constexpr (kIsInt8) score = __fmul_rn(score, shared.scales[key_of(tile, i)].x);
                score = scoring(score, shared.slots[key_of(tile, i)]);
                maxima[i / 2 % 2] = fmaxf(maxima[i / 2 % 2], score);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) maxima[half] = maximum_among<4>(maxima[half]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                const float* const two = &scores[tile][i / 2][half * 2];
                const float low = exp2f(two[0] - finite_maximum(maxima[half]));
                const float high = exp2f(two[1] - finite_maximum(maxima[half]));
                if constexpr (kIsInt8) {
                    const float2* const scales = shared.scales + key_of(tile, i / 2 * 4);
                    weights[tile][i] = pair_of<T>(__fmul_rn(low, __fdiv_rn(scales[0].y, unit)),
                                                  __fmul_rn(high, __fdiv_rn(scales[1].y, unit)));
                    sums[half] += low + high;
                } else {
                    const T rounded[2] = {from_float<T>(low), from_float<T>(high)};
                    weights[tile][i] = pair_of<T>(to_float(rounded[0]), to_float(rounded[1]));
                    sums[half] += to_float(rounded[0]) + to_float(rounded[1]);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_among<4>(sums[half]);
            if (member() == 0) {
                shared.maxima[warp()][half * 8 + group()] = maxima[half];
                shared.sums[warp()][half * 8 + group()] = sum;
            }
        }
    }

    // outputs += weights * values, for 16 keys and 64 columns.
    __device__ void multiply_values(int tile, int chunk) {
        unsigned values[4][4];  // of keys 2t, 2t+1, 2t+8 and 2t+9
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t slot = shared.slots[place_of(tile) + k / 2 * 8 + member() * 2 + k % 2];
            const uint4 piece = read(a.values, slot, a.E, chunk * kValueChunk + group() * 8);
            memcpy(values[k], &piece, sizeof piece);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            unsigned pairs[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const unsigned first = values[k * 2][j / 2], second = values[k * 2 + 1][j / 2];
                pairs[k] = j % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
            }
            multiply_tiles<T>(outputs[chunk][j], weights[tile], pairs);
        }
    }

    __device__ void attend() {
        if constexpr (kIsInt8) find_unit();
        weigh();
        memset(outputs, 0, sizeof outputs);
#pragma unroll
        for (int chunk = 0; chunk < ValueChunks; ++chunk) {
            if (chunk * kValueChunk >= a.E) break;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                if (sees(tile)) multiply_values(tile, chunk);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float output = outputs[chunk][j][i];
                    shared.outputs[warp()][chunk][i][j][lane()] = kIsInt8 ? __fmul_rn(output, unit) : output;
                }
            }
        }
    }

    // The four warps' results in order. Warp i has value i of all fragments, eight columns of one head at a time.
    __device__ void write_part(const Parts& parts, int64_t span) const {
        const int value = warp(), head = value / 2 * 8 + group();
        if (head >= heads) return;
        float maximum = -INFINITY, sum = 0, factors[kWarpsPerBlock];
        for (int w = 0; w < kWarpsPerBlock; ++w) maximum = fmaxf(maximum, shared.maxima[w][head]);
        for (int w = 0; w < kWarpsPerBlock; ++w) {
            factors[w] = exp2f(shared.maxima[w][head] - finite_maximum(maximum));
            sum = __fmaf_rn(shared.sums[w][head], factors[w], sum);
        }
        const int64_t vector = parts.vector(span, row, first_head + head, a.H);
        if (member() == 0 && value % 2 == 0) parts.maxima[vector] = maximum, parts.sums[vector] = sum;
        for (int chunk = 0; chunk < ValueChunks; ++chunk) {
            const int64_t e = chunk * kValueChunk + (member() * 2 + value % 2) * 8;
            if (e >= a.E) break;
            Piece<float> pieces[2];
            for (int j = 0; j < 8; ++j) {
                float total = 0;
                for (int w = 0; w < kWarpsPerBlock; ++w) {
                    total = __fmaf_rn(shared.outputs[w][chunk][value][j][lane()], factors[w], total);
                }
                pieces[j / 4].values[j % 4] = total;
            }
            float* const to = parts.outputs + vector * a.E + e;
            for (int i = 0; i < 2; ++i) store_piece(pieces[i], to, i);
        }
    }
};

template <typename T, typename S, int KeyChunks, int ValueChunks>
__global__ void __launch_bounds__(kThreads)
    make_parts(hb_paged_attention_args a, Scoring scoring, Parts parts, int64_t tiles, int64_t splits) {
    using Kernel = Attention<T, S, KeyChunks, ValueChunks>;
    typename Kernel::Memory& shared = *reinterpret_cast<typename Kernel::Memory*>(shared_memory());
    const Share share(parts, tiles, splits);
    const Row row = find_row(a, share.row);
    if (row.sequence < 0) return;
    const int64_t group = a.H / a.G, group_tiles = tiles / a.G;
    const int64_t kv_head = share.tile / group_tiles, first = share.tile % group_tiles * kHeads;
    const int64_t heads = group - first < kHeads ? group - first : kHeads;
    Kernel kernel = {a, scoring, shared, share.row, kv_head * group + first, heads, kv_head, 0, 0, {}, {}};
    kernel.arrange_queries();
    for (int64_t span = row.first_span() + share.split; span <= row.last_span(); span += splits) {
        find_slots(a, row, span, shared.slots);
        kernel.find_scales();
        kernel.begin = row.first - span * kSpanKeys;
        kernel.end = row.position + 1 - span * kSpanKeys;
        block_barrier();
        kernel.attend();
        block_barrier();
        kernel.write_part(parts, span);
    }
}

template <typename T, typename S, int KeyChunks, int ValueChunks>
void launch_size(const hb_paged_attention_args& a, const AttentionPlan& plan, const Parts& parts) {
    const int64_t tiles = a.G * ceil_div(a.H / a.G, kHeadTile), splits = plan.splits(tiles);
    launch(make_parts<T, S, KeyChunks, ValueChunks>, static_cast<unsigned>(parts.rows * tiles * splits), kThreads,
           sizeof(typename Attention<T, S, KeyChunks, ValueChunks>::Memory), stream_of(a.call), a, Scoring(a), parts,
           tiles, splits);
}

template <typename T, typename S>
void launch_dtypes(const hb_paged_attention_args& a, const AttentionPlan& plan, const Parts& parts) {
    const int64_t larger = a.D > a.E ? a.D : a.E;
    if (larger <= 64) {
        launch_size<T, S, 2, 1>(a, plan, parts);
    } else if (larger <= 128) {
        launch_size<T, S, 4, 2>(a, plan, parts);
    } else {
        launch_size<T, S, 8, 4>(a, plan, parts);
    }
}

template <typename T>
void launch_dtype(const hb_paged_attention_args& a, const AttentionPlan& plan, const Parts& parts) {
    if (a.store_dtype == HB_INT8) {
        launch_dtypes<T, int8_t>(a, plan, parts);
    } else {
        launch_dtypes<T, T>(a, plan, parts);
    }
}

}  // namespace

void launch_attention_mma(const hb_paged_attention_args& a, const AttentionPlan& plan, const Parts& parts) {
    if (a.dtype == HB_FLOAT16) {
        launch_dtype<__half>(a, plan, parts);
    } else {
        launch_dtype<__nv_bfloat16>(a, plan, parts);
    }
}

}  // namespace hb
