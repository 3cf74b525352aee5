// What attention.cpp and the variants of its inner part share: the shapes of a tile, and the order of every sum.
//
//     query vectors: (row, head) pairs of one sequence and kv head, row-major: row i, head j is vector i * group + j
//
//     key tile: 64 positions from a multiple of 64 on, packed: keys transposed, values as they are
//
//     span: 512 positions from a multiple of 512 on; each has a running softmax of its own
//
// A score adds its products over d = 1, 0, 3, 2, 5, 4 ...: within each pair the odd one first, each sum rounded, which
// is what AVX-512's bfloat16 instruction does. Outputs add theirs over keys in the same order. On AMX tiles the order
// is that of another instruction (attention_amx.cpp). Tiles and spans begin at fixed positions, so nothing that a row
// computes depends on who else is in the tile, as long as the values that those see are finite. Scores are in powers of
// two.
//
// Of a cache in int8 codes are packed, which every dtype holds exactly. A score is multiplied with its key's scale, and
// a weight with its value's once it has been counted: nothing is multiplied for each value, or rounded more than once.
#pragma once

#include <stdint.h>

#include "clones.h"

namespace hb::attention {

constexpr int64_t kLanes = 16;
constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileLanes = kTileKeys / kLanes;
// Query vectors that meet a key tile together: on vectors 6 x 4 sums fill 24 of 32 registers; on tiles, a tile's rows.
constexpr int64_t kBlockVectors = 6;
constexpr int64_t kMostBlockVectors = 16;

// 2^r = 1 + r * (c0 + c1 r + ... + c5 r^5) for |r| <= 1/2, relative error below 3e-9 before rounding.
constexpr float kExp2[6] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                            0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f};
constexpr float kSmallestPower = -125.0f;  // below, a weight is zero
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kTanhIsOne = 30.0f;           // 2^y from here on: tanh(y / (2 log2 e)) rounds to 1
constexpr float kRoundToInteger = 0x1.8p23f;  // added and taken away again, it leaves the nearest integer

// One call's sizes and options, as the inner part needs them.
struct Shape {
    int64_t dtype;  // of queries and outputs
    int64_t store;  // of keys and values
    int64_t D, E;
    int64_t padded_d;      // D rounded up to whole pairs
    int64_t padded_e;      // E rounded up to whole lanes
    int64_t vector_bytes;  // of one packed query vector
    bool is_capped;
    float scale;  // a product of query and key -> score; with a cap, -> the argument of tanh times 2 log2 e
    float cap;    // soft cap as a score; ignored unless is_capped
};

// Where the keys and values of a tile's 64 positions are, for the first kv head of an item, and their scales where they
// have some; null for positions that are not to be read. The offsets, in bytes, lead to another head.
struct TileRows {
    const char* keys[kTileKeys];
    const char* values[kTileKeys];
    const float* scales[kTileKeys];
    int64_t begin = 0, end = 0;  // the positions that are to be read
    int64_t key_stride = 0;      // from a position's keys to those of the next in its block
    int64_t key_offset = 0;
    int64_t value_offset = 0;

    const char* key(int64_t place) const { return keys[place] == nullptr ? nullptr : keys[place] + key_offset; }
    const char* value(int64_t place) const { return values[place] == nullptr ? nullptr : values[place] + value_offset; }
};

// Brings a tile into the second cache while the one before it is worked on, some lines a step. The heads of a position
// that an item takes along lie side by side, and so do positions, so lines are fetched in the order of memory.
class Fetching {
  public:
    // Of each position so many bytes of keys and of values, in about this many steps.
    Fetching(const TileRows& rows, int64_t key_bytes, int64_t value_bytes, int64_t steps)
        : rows_(rows.keys),
          values_(rows.values),
          begin_(rows.begin),
          end_(rows.end),
          bytes_(key_bytes),
          value_bytes_(value_bytes),
          place_(rows.begin) {
        const int64_t lines = (key_bytes + kLine - 1) / kLine + (value_bytes + kLine - 1) / kLine;
        pace_ = ((rows.end - rows.begin) * lines + steps - 1) / steps;
    }
    HB_INLINE void step() {
        if (place_ >= end_) return;
        // In registers: whoever packs writes to memory that the compiler takes for this, too.
        int64_t place = place_, at = at_;
        const char* const* const rows = rows_;
        const int64_t bytes = bytes_, end = end_;
        for (int64_t i = pace_; i > 0 && place < end; --i) {
            __builtin_prefetch(rows[place] + at, 0, 2);
            at += kLine;
            if (at >= bytes) at = 0, ++place;
        }
        place_ = place, at_ = at;
        if (place == end && rows != values_) rows_ = values_, bytes_ = value_bytes_, place_ = begin_;
    }

  private:
    static constexpr int64_t kLine = 64;
    const char* const* rows_;  // keys, then values
    const char* const* const values_;
    const int64_t begin_, end_;
    int64_t bytes_;
    const int64_t value_bytes_;
    int64_t place_, at_ = 0, pace_;
};

// The scales of a tile's keys and values; zeros for positions that are not to be read.
struct TileScales {
    float keys[kTileKeys];
    float values[kTileKeys];
};

// Some query vectors, what they may see of the tile, and their running softmax.
struct Block {
    int64_t vectors;
    const TileScales* scales;  // null unless keys and values are int8
    const char* queries;       // [vectors] of Shape::vector_bytes
    // Positions of the tile that a vector sees: begin .. end - 1, empty if end <= begin.
    int64_t begin[kMostBlockVectors], end[kMostBlockVectors];
    float* maxima;   // [vectors] largest score so far
    float* sums;     // [vectors, kLanes] sum of weights so far, in lanes
    float* outputs;  // [vectors, padded_e] weighted sum of values so far
};

// The positions of the tile that any of the block's vectors sees.
struct Seen {
    int64_t begin, end;
};

HB_INLINE Seen seen_by(const Block& block) {
    Seen seen = {kTileKeys, 0};
    for (int64_t vector = 0; vector < block.vectors; ++vector) {
        seen.begin = block.begin[vector] < seen.begin ? block.begin[vector] : seen.begin;
        seen.end = block.end[vector] > seen.end ? block.end[vector] : seen.end;
    }
    return seen;
}

// One way to do the inner part. Packed sizes are those of float32, whatever the variant keeps there.
struct Variant {
    bool keeps_pairs;       // queries, keys and values are bfloat16, two to a 32-bit lane
    int64_t block_vectors;  // of a block, at most kMostBlockVectors; queries are read as if it had as many
    // Fills keys [padded_d, 64] and values [64, padded_e], zeros where a row is null. Sixteen from a multiple of
    // sixteen on that are all null may stay as they are: attend may compute with their keys, but masks what comes of
    // them. Takes steps of fetching what is next, Job::pack_steps.
    void (*pack)(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values);
    // Scores, weights and outputs of one block over one packed tile, of which at least one vector sees something.
    void (*attend)(const Shape& shape, const float* keys, const float* values, const Block& block);
    // The same for single rows, whose vectors are one block, with packing; null where there is nothing to gain. Keys
    // are read where they lie, sixteen positions of a block of the cache at a time, and what comes of those that nobody
    // sees is masked. `turned` are the vectors as turn leaves them, [padded_d / 2, 16].
    void (*turn)(const Shape& shape, const char* queries, int64_t vectors, float* turned);
    void (*attend_alone)(const Shape& shape, const TileRows& rows, Fetching& next, const float* turned, float* values,
                         const Block& block);
    // What a thread does before its first block and after its last; null where it is nothing.
    void (*begin)();
    void (*end)();
};

const Variant& baseline();
// sums[i][n] += x[i][k] * y[k][n] for k from begin to end, both even; at most kBlockVectors vectors i, `columns` n,
// which are whole lanes. Products are fused with the sums.
void multiply_avx2(int64_t vectors, int64_t columns, float* sums, int64_t sums_stride, const float* x, int64_t x_stride,
                   const float* y, int64_t y_stride, int64_t begin, int64_t end);
// As Variant::pack, for AVX-512: everything as float32, or bfloat16 in pairs.
void pack_floats_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values);
void pack_pairs_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values);
void pack_value_pairs_avx512(const Shape& shape, const TileRows& rows, Fetching& next, float* values);
// Tiles, for bfloat16 queries over bfloat16 or int8; heads of some sizes alone.
bool fit_tiles(int64_t D, int64_t E);
const Variant& on_tiles();
// The variant that this CPU runs fastest, for queries of `dtype` over keys and values of `store`.
const Variant& fastest(int64_t dtype, int64_t store, int64_t D, int64_t E);

}  // namespace hb::attention
