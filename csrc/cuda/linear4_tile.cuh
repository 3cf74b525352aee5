// The tile of out that a thread block of four warps makes in the 4-bit matmul on tensor cores, for one weight
// (linear4_mma.cu) and for those of experts (linear4_experts_mma.cu): x in 16 bits, K a multiple of 64.
//
// Each warp has 16 or 32 rows of W of its own and all of the tile's rows of x, so that a weight is decoded once per
// tile (float_sums.cuh).
//
//     shared memory:  256 pairs of table entries, one copy per lane | 256 entries of the absmax map | a ring of stages
//     a stage:        128 values of K:   packed codes, 64 bytes a row of W | x, 256 bytes a row
//     a chunk:        64 values of K, four tensor-core steps of 16
//
// Nothing is rearranged in memory: the order of K within a chunk is free as long as both operands agree. The 16 values
// that a lane has of a chunk are 8 neighbouring bytes of codes and 32 of x. A byte of codes is two weights side by
// side, and one 4-byte look-up, which no two lanes make from the same bank, gives both as they go into the product:
// T(table[code] * lift), without their scale (formats.h has the lift and its reason).
//
// That comes later: a chunk's products are added up from zero, and their sum times the block's absmax is added to the
// total, in float32 with one rounding. A product of the dequantized weight rounds each of them to T; this rounds only
// the table. Blocks of 32 values are two of a chunk: it is multiplied twice, each time with the other block's weights
// left out.
//
// Pipeline: a stage's copies start one to three stages ahead; a single barrier per stage says both that its bytes are
// here and that the slot read before may be written again. absmax is read one stage ahead into registers, as stored.
// 16-byte pieces lie in an order in which the eight (of x) or sixteen (of codes) lanes of one access meet no bank
// twice.
#pragma once

#include "linear4_parts.cuh"

namespace hb {

struct Problem4 {
    Rows codes;  // of W, two in a byte
    Rows x;
    Scales scales;
    int64_t K;
    int64_t format;
    float lift;
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
          lift(lift_of(a.format, a.x_dtype)),
          outputs{a.M, a.N, nullptr, 1 / lift, a.bias, a.bias_dtype, a.out, stride, slices},
          slice_values(plan.slice_values),
          token_tiles(plan.token_tiles),
          tiles(0) {}
};

struct PlaceOfCodes4 {
    __device__ static int of(int row, int piece) { return piece ^ (row & 2); }
};

// Scaled: how many neighbouring values of K are added up before their scale, 32 or 64.
template <typename T, int WeightRows, int Tokens, int Stages, int Scaled>
struct Linear4Tile {
    static constexpr int kRows = WeightRows;
    static constexpr int kTokens = Tokens;
    static constexpr int kWarpRows = kRows / kWarpsPerBlock;
    static constexpr int kWeightTiles = kWarpRows / 16;
    static constexpr int kChunks = kStageValues / kChunkValues;
    static constexpr int kScales = kChunkValues / Scaled;  // of a row, in a chunk
    static constexpr int kXRowBytes = kStageValues * 2;
    static constexpr int kMapBytes = 256 * 4;  // used where absmax is double-quantized
    static constexpr int kStageBytes = kRows * kCodeRowBytes + kTokens * kXRowBytes;
    static constexpr int kSharedBytes = kPairTableBytes + kMapBytes + Stages * kStageBytes;

    const Problem4& p;
    int64_t first_row;
    int64_t first_token;
    unsigned char* shared;
    StageCopies<PlaceOfCodes4, kRows, kCodeRowBytes, kMmaThreads> codes;
    StageCopies<PlaceOfX, kTokens, kXRowBytes, kMmaThreads> x;
    LaneOfX<kXRowBytes> lane_of_x;
    unsigned lane_of_codes;  // where it finds its codes of chunk 0 in a stage, in the warp's first row that it reads
    unsigned lane_of_table;
    FloatSums<T, kWeightTiles, kTokens / 8> sums;
    TileScales scales;
    unsigned rows[kWeightTiles][2];                       // where rows g and g + 8 begin in the tile, or its last row
    StoredScale next[kChunks][kScales][kWeightTiles][2];  // of rows g and g + 8 in the stage that comes next

    __device__ Linear4Tile(const Problem4& problem, int64_t row, int64_t token)
        : p(problem),
          first_row(row),
          first_token(token),
          shared(shared_memory()),
          codes(problem.codes, row),
          x(problem.x, token),
          lane_of_codes(kept(static_cast<unsigned>((warp_row() + lane() / 4) * kCodeRowBytes +
                                                   PlaceOfCodes4::of(lane() / 4, lane() % 4 / 2) * kPieceBytes +
                                                   lane() % 2 * 8))),
          lane_of_table(kept(static_cast<unsigned>(lane()) * 4u)),
          sums{},
          scales(problem.scales, row * problem.K),
          next{} {
#pragma unroll
        for (int i = 0; i < kWeightTiles * 2; ++i) {
            const int64_t last = p.outputs.N - first_row - 1, own = warp_row() + i * 8 + lane() / 4;
            rows[i / 2][i % 2] = static_cast<unsigned>((own < last ? own : last) * p.K);
        }
    }

    __device__ unsigned char* codes_at(int slot) const {
        return shared + kPairTableBytes + kMapBytes + slot * kStageBytes;
    }
    __device__ unsigned char* x_at(int slot) const { return codes_at(slot) + kRows * kCodeRowBytes; }
    __device__ const float* map() const { return reinterpret_cast<const float*>(shared + kPairTableBytes); }

    // The pipeline's first barrier lets all see them.
    __device__ void fill_tables() {
        fill_pairs<T, kWarpsPerBlock>(shared, p.format, p.lift);
        if (scales.are_nested()) {
            float* const map = reinterpret_cast<float*>(shared + kPairTableBytes);
            for (int i = static_cast<int>(threadIdx.x); i < kDeviceDynamic.length; i += kMmaThreads) {
                map[i] = kDeviceDynamic.at[i];
            }
        }
    }

    // Starts the copies of a stage. Rows behind the last are zeros; what lies behind K is never looked at.
    __device__ void fetch(int stage, int slot) const {
        codes.start(codes_at(slot), stage);
        x.start(x_at(slot), stage);
    }

    __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp * kWarpRows; }

    // Of columns that are not there, which are not multiplied, those of the last ones that are.
    __device__ void read_scales(int stage) {
#pragma unroll
        for (int i = 0; i < kChunks * kScales; ++i) {
            const unsigned k = columns_at<Scaled>(stage * kStageValues + i * Scaled, p.K);
#pragma unroll
            for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    next[i / kScales][i % kScales][w][half] = scales.stored(rows[w][half] + k);
                }
            }
        }
    }

    // Those read last.
    __device__ void take_scales(float (&now)[kChunks][kScales][kWeightTiles][2]) const {
#pragma unroll
        for (int i = 0; i < kChunks * kScales; ++i) {
#pragma unroll
            for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    now[i / kScales][i % kScales][w][half] =
                        scales.value(next[i / kScales][i % kScales][w][half], map());
                }
            }
        }
    }

    __device__ unsigned decode(unsigned word, int which) const { return pair_at(shared, word, which, lane_of_table); }

    // A chunk's weights as the tensor core takes them; `kept`: all bits, or none in lanes whose weights count as zeros.
    __device__ void decode_chunk(unsigned (&weights)[kWeightTiles][4][4], const unsigned char* codes, int chunk,
                                 unsigned kept) const {
        codes += lane_of_codes ^ static_cast<unsigned>(chunk * 2 * kPieceBytes);
#pragma unroll
        for (int w = 0; w < kWeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 words = *reinterpret_cast<const uint2*>(codes + (w * 16 + half * 8) * kCodeRowBytes);
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    const unsigned word = step < 2 ? words.x : words.y;
                    weights[w][step][half] = decode(word, step % 2 * 2) & kept;
                    weights[w][step][half + 2] = decode(word, step % 2 * 2 + 1) & kept;
                }
            }
        }
    }

    __device__ void multiply_chunk(const unsigned char* codes, const unsigned char* x, int chunk,
                                   const float (&scale)[kScales][kWeightTiles][2]) {
#pragma unroll
        for (int block = 0; block < kScales; ++block) {
            // Of two blocks in a chunk, two lanes of four have one.
            const bool is_own = kScales == 1 || lane() % 4 / 2 == block;
            unsigned weights[kWeightTiles][4][4];
            decode_chunk(weights, codes, chunk, is_own ? 0xffffffffu : 0u);
            sums.multiply_scaled(weights, scale[block], x, lane_of_x, chunk);
        }
    }

    // Columns [begin, end) of K, of whole slices but for the last one.
    __device__ void multiply(int64_t begin, int64_t end) {
        const int slice_stages = static_cast<int>(p.slice_values / kStageValues);
        const int first = static_cast<int>(begin / kStageValues);
        const int last = static_cast<int>((end + kStageValues - 1) / kStageValues);
        const int chunks = static_cast<int>(p.K / kChunkValues);
        int left = slice_stages;
        read_scales(first);
        run_pipeline<Stages>(
            first, last, [&](int stage, int slot) { fetch(stage, slot); },
            [&](int stage, int slot) {
                float now[kChunks][kScales][kWeightTiles][2];
                take_scales(now);
                read_scales(stage + 1);
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    if (stage * kChunks + chunk < chunks) {
                        multiply_chunk(codes_at(slot), x_at(slot), chunk, now[chunk]);
                    }
                }
                if (--left == 0 || stage + 1 == last) {
                    sums.end_slice();
                    left = slice_stages;
                }
            });
    }

    __device__ void write(int64_t slice) const { sums.write(p.outputs, first_row + warp_row(), first_token, slice); }
};

}  // namespace hb
