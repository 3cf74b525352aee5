// The tile of out that a thread block of four warps makes in the 4-bit matmul on tensor cores, for one weight
// (linear4_mma.cu) and for those of experts (linear4_experts_mma.cu): x in 16 bits, K a multiple of 64.
//
// Each warp has 16 or 32 rows of W of its own and all of the tile's rows of x, so that a weight is decoded once per
// tile (float_sums.cuh).
//
//     shared memory:  16 table entries, one copy per lane | 256 entries of the absmax map | a ring of stages
//     a stage:        128 values of K:   packed codes, 64 bytes a row of W | x, 256 bytes a row
//     a chunk:        64 values of K, four tensor-core steps of 16
//
// Nothing is rearranged in memory: the order of K within a chunk is free as long as both operands agree. The 16 values
// that a lane has of a chunk are 8 neighbouring bytes of codes and 32 of x, and since blocks hold at least 32 values,
// they share one absmax. A weight is what dequantize4 gives, bit for bit: T(table[code] * absmax). Its look-up is one
// 4-byte read that no two lanes make from the same bank: 32 weights a clock and multiprocessor, which an A100's memory
// does not outrun, but an H200's would.
//
// Pipeline: a stage's copies start two or three stages ahead; a single barrier per stage says both that its bytes are
// here and that the slot read before may be written again. absmax is read one stage ahead into registers, as stored.
// 16-byte pieces lie in an order in which the eight (of x) or sixteen (of codes) lanes of one access meet no bank
// twice.
#pragma once

#include "linear4_parts.cuh"

namespace hb {

constexpr int kLaneValues = 16;  // of a chunk

struct Problem4 {
    Rows codes;  // of W, two in a byte
    Rows x;
    Scales scales;
    int64_t K;
    int64_t format;
    Outputs outputs;
    int64_t slice_values;
    int64_t token_tiles;
    int64_t tiles;

    // Of one weight, or of the first expert's first matrix. `Plan`: MatmulPlan or ExpertsPlan.
    template <typename Args, typename Plan>
    Problem4(const Args& a, const Plan& plan, int64_t stride, float* slices)
        : codes(a.packed, a.N, a.K / 2),
          x(a.x, a.M, a.K * 2),
          scales(a),
          K(a.K),
          format(a.format),
          outputs{a.M, a.N, nullptr, a.bias, a.bias_dtype, a.out, stride, slices},
          slice_values(plan.slice_values),
          token_tiles(plan.token_tiles),
          tiles(0) {}
};

struct PlaceOfCodes4 {
    __device__ static int of(int row, int piece) { return piece ^ (row & 2); }
};

template <typename T, int WeightRows, int Tokens, int Stages>
struct Linear4Tile {
    static constexpr int kRows = WeightRows;
    static constexpr int kTokens = Tokens;
    static constexpr int kWarpRows = kRows / kWarpsPerBlock;
    static constexpr int kWeightTiles = kWarpRows / 16;
    static constexpr int kChunks = kStageValues / kChunkValues;
    static constexpr int kXRowBytes = kStageValues * 2;
    static constexpr int kTableBytes = 16 * kWarp * 4;
    static constexpr int kMapBytes = 256 * 4;  // used where absmax is double-quantized
    static constexpr int kStageBytes = kRows * kCodeRowBytes + kTokens * kXRowBytes;
    static constexpr int kSharedBytes = kTableBytes + kMapBytes + Stages * kStageBytes;

    const Problem4& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;
    FloatSums<T, kWeightTiles, kTokens / 8> sums;
    float scales[kChunks][kWeightTiles][2];  // absmax of rows g and g + 8 in the stage that comes next

    __device__ Linear4Tile(const Problem4& problem, int64_t row, int64_t token)
        : p(problem), first_row(row), first_token(token), shared(shared_memory()), sums{}, scales{} {}

    __device__ unsigned char* codes_of(int64_t stage) const {
        return shared + kTableBytes + kMapBytes + stage % Stages * kStageBytes;
    }
    __device__ unsigned char* x_of(int64_t stage) const { return codes_of(stage) + kRows * kCodeRowBytes; }

    __device__ void fill_tables() {
        float* const table = reinterpret_cast<float*>(shared);
        for (int i = static_cast<int>(threadIdx.x); i < 16 * kWarp; i += kMmaThreads) {
            table[i] = code_value(p.format, i / kWarp);
        }
        if (p.scales.absmax.nested_absmax != nullptr) {
            float* const map = reinterpret_cast<float*>(shared + kTableBytes);
            for (int i = static_cast<int>(threadIdx.x); i < kMap.length; i += kMmaThreads) map[i] = kMap.at[i];
        }
        block_barrier();
    }

    // Starts the copies of a stage. Rows behind the last are zeros; what lies behind K is never looked at.
    __device__ void fetch(int64_t stage) const {
        copy_rows<PlaceOfCodes4, kRows, kCodeRowBytes, kMmaThreads>(codes_of(stage), p.codes, first_row,
                                                                    stage * kCodeRowBytes);
        copy_rows<PlaceOfX, kTokens, kXRowBytes, kMmaThreads>(x_of(stage), p.x, first_token, stage * kXRowBytes);
    }

    __device__ float scale_at(int64_t row, int64_t k) const {
        if (row >= p.outputs.N || k >= p.K) return 0.0f;
        const float* const map = reinterpret_cast<const float*>(shared + kTableBytes);
        return p.scales.value(p.scales.stored(row * p.K + k), map);
    }

    __device__ int64_t warp_row() const { return static_cast<int64_t>(threadIdx.x) / kWarp * kWarpRows; }

    __device__ void read_scales(int64_t stage) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int64_t k = stage * kStageValues + chunk * kChunkValues + lane() % 4 * kLaneValues;
#pragma unroll
            for (int w = 0; w < kWeightTiles; ++w) {
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
                                   const float (&scale)[kWeightTiles][2]) {
        const int group = lane() / 4, member = lane() % 4;
        unsigned weights[kWeightTiles][4][4];
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = static_cast<int>(warp_row()) + w * 16 + half * 8 + group;
                const int at = PlaceOfCodes4::of(row, chunk * 2 + member / 2) * kPieceBytes + member % 2 * 8;
                const uint2 words = *reinterpret_cast<const uint2*>(codes + row * kCodeRowBytes + at);
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    const unsigned word = step < 2 ? words.x : words.y;
                    weights[w][step][half] = decode(word, step % 2 * 2, scale[w][half]);
                    weights[w][step][half + 2] = decode(word, step % 2 * 2 + 1, scale[w][half]);
                }
            }
        }
        sums.template multiply<kXRowBytes>(weights, x, chunk);
    }

    // Columns [begin, end) of K, of whole slices but for the last one.
    __device__ void multiply(int64_t begin, int64_t end) {
        const int64_t slice_stages = p.slice_values / kStageValues;
        const int64_t first = begin / kStageValues, last = (end + kStageValues - 1) / kStageValues;
        read_scales(first);
        run_pipeline<Stages>(
            first, last, [&](int64_t stage) { fetch(stage); },
            [&](int64_t stage) {
                float now[kChunks][kWeightTiles][2];
                memcpy(now, scales, sizeof now);
                read_scales(stage + 1);
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    if (stage * kStageValues + chunk * kChunkValues < p.K) {
                        multiply_chunk(codes_of(stage), x_of(stage), chunk, now[chunk]);
                    }
                }
                if ((stage + 1) % slice_stages == 0 || stage + 1 == last) sums.end_slice();
            });
    }

    __device__ void write(int64_t slice) const { sums.write(p.outputs, first_row + warp_row(), first_token, slice); }
};

}  // namespace hb
