// A thread block of linear4_hopper.cu, whose header says what it does: its shared memory, and what its three warpgroups
// do.
#pragma once

#include "linear4_hopper.h"
#include "linear4_parts.cuh"

namespace hb {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kConsumerThreads + kWarpgroup;
constexpr int kRows = kHopperRows;
constexpr int kOrdered = 32;          // values of K within which x changes places
constexpr int kStep = 16;             // values of K that a tensor core takes at once
constexpr int kTileValues = 64;       // of K, in a row of a tile of x
constexpr int kTotalRow = kRows + 4;  // floats: lanes of one access meet no bank twice
constexpr int kBarrierBytes = 128;
static_assert(kRows == kWarpgroup, "a producer's thread looks after one row of scales");

struct HopperProblem {
    const unsigned char* image;  // x, rearranged
    Rows codes;                  // of W, two in a byte
    Scales scales;
    int64_t K;
    int64_t format;
    float lift;
    Outputs outputs;  // of a panel
    int slice_stages;
    int64_t token_tiles;
    int64_t tiles;
};

// Eight rows of one access share out the banks.
struct PlaceOfHopperCodes {
    __device__ static int of(int row, int piece) { return piece ^ (row / 2 % 4); }
};

// Scaled: of how many neighbouring values of K the products are added up before their scale.
template <typename T, int Tokens, int Scaled, int Stages>
struct HopperBlock {
    static constexpr int kXTileBytes = Tokens * kSwizzledRow;
    static constexpr int kXBytes = kStageValues / kTileValues * kXTileBytes;
    static constexpr int kCodeBytes = kRows * kCodeRowBytes;
    static constexpr int kScales = kStageValues / Scaled;  // of a row, in a stage
    static constexpr int kStageBytes = kXBytes + kCodeBytes + kScales * kRows * 4;
    static constexpr int kSharedBytes = Stages * kStageBytes + kPairTableBytes + Tokens * kTotalRow * 4 + kBarrierBytes;
    static_assert(kStageBytes % kSwizzledRows == 0, "tiles begin where they repeat");

    const HopperProblem& p;
    int64_t first_row;
    int64_t token_tile;
    unsigned char* stages;

    // Which stage of the ring is next, and whether that is an odd time.
    struct Turn {
        int slot = 0;
        unsigned parity = 0;

        __device__ void pass() {
            if (++slot < Stages) return;
            slot = 0;
            parity ^= 1;
        }
    };

    __device__ unsigned char* x_at(int slot) const { return stages + slot * kStageBytes; }
    __device__ unsigned char* codes_at(int slot) const { return x_at(slot) + kXBytes; }
    __device__ float* scales_at(int slot) const { return reinterpret_cast<float*>(codes_at(slot) + kCodeBytes); }
    __device__ unsigned char* table() const { return stages + Stages * kStageBytes; }
    __device__ float* totals() const { return reinterpret_cast<float*>(table() + kPairTableBytes); }
    __device__ Barrier* full(int slot) const {
        return reinterpret_cast<Barrier*>(totals() + Tokens * kTotalRow) + slot;
    }
    __device__ Barrier* empty(int slot) const { return full(slot) + Stages; }

    __device__ void begin_barriers() const {
        static_assert(2 * Stages * sizeof(Barrier) <= kBarrierBytes, "barriers must fit");
        // Each producer's thread arrives with its scales and with its copies, and one announces the bulk copy of x.
        constexpr int fill = 2 * kWarpgroup + 1;
        constexpr int leave = kConsumerThreads / kWarp;
        if (threadIdx.x == 0) {
            for (int i = 0; i < Stages; ++i) {
                barrier_begin(full(i), fill);
                barrier_begin(empty(i), leave);
            }
            barriers_begun();
        }
        block_barrier();
    }

    // --- the producer

    struct Producer {
        static constexpr int kGroup = 2;  // stages whose scales are read together

        const HopperBlock& block;
        int own;                 // thread of the warpgroup, and row of the tile
        const unsigned char* x;  // the tile's, in stage 0
        StageCopies<PlaceOfHopperCodes, kRows, kCodeRowBytes, kWarpgroup> codes;
        TileScales scales;
        unsigned row;  // where the row begins in the tile, or the last one that there is
        StoredScale next[kGroup][kScales];
        Turn turn;

        __device__ Producer(const HopperBlock& of, int thread)
            : block(of),
              own(thread),
              x(of.p.image + of.token_tile * ((of.p.K + kStageValues - 1) / kStageValues) * kXBytes),
              codes(of.p.codes, of.first_row),
              scales(of.p.scales, of.first_row * of.p.K) {
            const int64_t last = of.p.outputs.N - of.first_row - 1;
            row = static_cast<unsigned>((own < last ? own : last) * of.p.K);
        }

        // Of the group that begins with this stage, while the one before it is in use: whoever waits for a load waits
        // for all that are under way, so a group is waited for once, and then the next is read. Of columns that are not
        // there, those of the last ones that are.
        __device__ void read_scales(int stage) {
#pragma unroll
            for (int i = 0; i < kGroup * kScales; ++i) {
                const unsigned columns = columns_at<Scaled>(stage * kStageValues + i * Scaled, block.p.K);
                next[i / kScales][i % kScales] = scales.stored(row + columns);
            }
        }

        // Those of the group that were read last.
        __device__ void take_scales(int stage, float (&now)[kGroup][kScales]) const {
#pragma unroll
            for (int i = 0; i < kGroup * kScales; ++i) {
                const bool there = stage * kStageValues + i * Scaled < static_cast<int>(block.p.K);
                const float value = scales.value(next[i / kScales][i % kScales], kDeviceDynamic.at);
                now[i / kScales][i % kScales] = there ? value : 0.0f;
            }
        }

        __device__ void write_scales(int slot, const float (&now)[kScales]) const {
            float* const to = block.scales_at(slot) + own;
#pragma unroll
            for (int i = 0; i < kScales; ++i) to[i * kRows] = now[i];
            barrier_arrive(block.full(slot));
        }

        __device__ void fetch_codes(int slot, int stage) const {
            codes.start_aligned(block.codes_at(slot), stage);
            barrier_arrive_after_copies(block.full(slot));
        }

        __device__ void fetch_x(int slot, int stage) const {
            if (own != 0) return;
            barrier_arrive_expecting(block.full(slot), kXBytes);
            bulk_copy(block.x_at(slot), x + static_cast<int64_t>(stage) * kXBytes, kXBytes, block.full(slot));
        }

        // Weights come first: they do not wait for the kernel in front, which makes the image of x.
        __device__ void fill(int begin, int count) {
            read_scales(begin);
            for (int slot = 0; slot < count; ++slot) fetch_codes(slot, begin + slot);
            predecessors_wait();
            for (int slot = 0; slot < count; ++slot) fetch_x(slot, begin + slot);
        }

        __device__ void refill(int stage) const {
            barrier_wait(block.empty(turn.slot), turn.parity ^ 1);
            fetch_x(turn.slot, stage);
            fetch_codes(turn.slot, stage);
        }

        __device__ void run(int begin, int end) {
            const int filled = end - begin < Stages ? end : begin + Stages;
            fill(begin, filled - begin);
            for (int first = begin; first < end; first += kGroup) {
                float now[kGroup][kScales];
                take_scales(first, now);
                read_scales(first + kGroup);
#pragma unroll
                for (int i = 0; i < kGroup; ++i) {
                    const int stage = first + i;
                    if (stage >= end) break;
                    if (stage >= filled) refill(stage);
                    write_scales(turn.slot, now[i]);
                    turn.pass();
                }
            }
            copies_commit();
            copies_wait<0>();  // a thread does not end before its copies
        }
    };

    // Where in a stage a 16-byte piece of a row of codes lies.
    __device__ static int place_of_codes(int row, int piece) {
        return row * kCodeRowBytes + PlaceOfHopperCodes::of(row, piece) * kPieceBytes;
    }

    // --- a consumer

    struct Consumer {
        static constexpr int kSums = Tokens / 2;  // of a thread
        static constexpr int kSteps = Scaled / kStep;

        const HopperBlock& block;
        int group_row;        // the first of the warpgroup's rows in the tile
        float sums[kSums];    // of the current slice
        float parts[kSums];   // of one scale: being added up by the tensor cores, but for a moment
        float part_scale[2];  // theirs, of rows g and g + 8
        Turn turn;
        unsigned own_entry;  // in a row of the table, in bytes

        __device__ int row() const {
            return group_row + static_cast<int>(threadIdx.x) % kWarpgroup / kWarp * 16 + lane() / 4;
        }

        __device__ void fill_table() const {
            fill_pairs<T, kConsumerThreads / kWarp>(block.table(), block.p.format, block.p.lift);
            group_barrier(1, kConsumerThreads);
        }

        __device__ unsigned decode(unsigned word, int which) const {
            return pair_at(block.table(), word, which, own_entry);
        }

        __device__ void decode_rows(unsigned (&weights)[kSteps][4], const unsigned char* codes, int scaled) const {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < Scaled / kOrdered; ++i) {
                    const int piece = scaled * (Scaled / kOrdered) + i;
                    const unsigned word = *reinterpret_cast<const unsigned*>(
                        codes + place_of_codes(row() + half * 8, piece) + lane() % 4 * 4);
#pragma unroll
                    for (int byte = 0; byte < 4; ++byte) {
                        weights[i * 2 + byte / 2][half + byte % 2 * 2] = decode(word, byte);
                    }
                }
            }
        }

        // Adds what the tensor cores have added up.
        __device__ void take_parts() {
            products_wait(parts);
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] = __fmaf_rn(parts[i], part_scale[i / 2 % 2], sums[i]);
        }

        __device__ void leave(int slot) const {
            warp_barrier();
            if (lane() == 0) barrier_arrive(block.empty(slot));
        }

        // A slice of so many stages. Weights are decoded while the tensor cores are busy with those before.
        __device__ void multiply(int count) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] = parts[i] = 0.0f;
            part_scale[0] = part_scale[1] = 0.0f;
            int before = -1;
            for (int i = 0; i < count; ++i, turn.pass()) {
                barrier_wait(block.full(turn.slot), turn.parity);
                const unsigned char* const codes = block.codes_at(turn.slot);
                const float* const scales = block.scales_at(turn.slot) + row();
                const uint64_t x = swizzled_tile(shared_address(block.x_at(turn.slot)));
#pragma unroll
                for (int scaled = 0; scaled < kScales; ++scaled) {
                    unsigned weights[kSteps][4];
                    decode_rows(weights, codes, scaled);
                    take_parts();
                    if (scaled == 0 && before >= 0) leave(before);
                    part_scale[0] = scales[scaled * kRows];
                    part_scale[1] = scales[scaled * kRows + 8];
                    constexpr int tile_steps = kTileValues / kStep;
                    const int first = scaled * kSteps;
                    products_begin();
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        const int at = first + step;
                        const uint64_t tile = x + static_cast<uint64_t>(at / tile_steps * (kXTileBytes >> 4));
                        multiply_rows(T(), parts, weights[step], tile_step(tile, at % tile_steps), step != 0);
                    }
                    products_commit();
                }
                before = turn.slot;
            }
            take_parts();
            leave(before);
        }

        // Adds the slice's sums to the totals, [rows of x, rows of W] in shared memory: each thread to its own.
        __device__ void end_slice(bool is_first) const {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                const int token = i / 4 * 8 + lane() % 4 * 2 + i % 2;
                float* const total = block.totals() + token * kTotalRow + row() + i / 2 % 2 * 8;
                *total = __fadd_rn(is_first ? 0.0f : *total, sums[i]);
            }
        }

        __device__ void write(int slice) const {
            const Outputs& outputs = block.p.outputs;
            group_barrier(2 + group_row / 64, kWarpgroup);
            const int64_t first_token = block.token_tile * Tokens;
            const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp;
            for (int token = warp; token < Tokens && first_token + token < outputs.M; token += kWarpgroup / kWarp) {
                const int64_t m = first_token + token;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = group_row + half * kWarp + lane();
                    const int64_t n = block.first_row + at;
                    if (n >= outputs.N) continue;
                    const float total = block.totals()[token * kTotalRow + at];
                    if (outputs.slices != nullptr) {
                        outputs.slices[(slice * outputs.M + m) * outputs.N + n] = total;
                    } else {
                        outputs.template finish<T>(total, m, n);
                    }
                }
            }
        }

        __device__ void run(int slice, int count) {
            fill_table();
            for (int done = 0; done < count; done += block.p.slice_stages) {
                const int left = count - done;
                multiply(left < block.p.slice_stages ? left : block.p.slice_stages);
                end_slice(done == 0);
            }
            successors_may_start();
            write(slice);
        }
    };
};

}  // namespace hb
