// Products of float activations with weights that are decoded on the way: what the entries (linear4.cpp,
// linear4_experts.cpp, and linear8.cpp for weights alone in int8), the ways to multiply (vectors.cpp, columns.cpp,
// fixed.cpp, tiled.cpp) and the variants (decoded_<level>.cpp) share.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "decode4.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

constexpr int64_t kWeightRows = 4;        // of a weight, that meet the rows of x together
constexpr int64_t kMostTileRows = 16;     // weight rows in a tile, at most: more sums crowd x out of the first cache
constexpr int64_t kMostRowsTogether = 8;  // rows of x that are finished together, at most
constexpr int64_t kRowsPerPass = 256;     // rows of x that are multiplied together, at most

// A packed weight [N, K] and where its values come from.
struct DecodedWeight {
    const uint8_t* codes;  // two in a byte of the flattened weight, or int8 [N, K]
    int64_t format;        // of 4-bit codes; ignored for int8
    int64_t blocksize;     // codes under one absmax; K for int8
    AbsmaxSource absmax;   // [ceil(N * K / blocksize)]
    bool is_int8;
};

// One call: x [M, K] * weight^T + bias -> out [M, N] in x's dtype.
struct DecodedCall {
    const void* x;
    int64_t x_dtype;
    int64_t M, N, K;
    DecodedWeight weight;
    const void* bias;  // [N] or null
    int64_t bias_dtype;
    void* out;
    int64_t out_stride;     // values from one row of out to the next
    bool batch_invariant;   // as hb_call has it
    bool rounds_x = false;  // to int8, as hb_linear4_int8 has it; only in fixed point
};

// How far it is from one matrix to the next where several lie behind each other: bytes of codes, elements of the rest.
struct MatrixStrides {
    int64_t codes, absmax, nested_absmax, offset, bias;
};

// The same call with the weight and the bias that lie `matrices` further on.
DecodedCall moved(DecodedCall call, const MatrixStrides& strides, int64_t matrices);

// Calls that are made together, with x, x_dtype, M and K in common. Their rows may be those of experts, one expert's
// behind the other's; then the calls' weights are the first expert's, and `count` matrices on are the next one's.
struct DecodedCalls {
    DecodedCall at[HB_MAX_GROUP];
    int64_t count;
    const int64_t* ends;  // [experts] behind each one's last row, checked; null: all rows meet the calls' own weights
    int64_t experts;
    MatrixStrides strides;
};

// What a table is multiplied by before it is rounded to bfloat16 where sums are scaled and not the table.
HB_INLINE constexpr float lift_of(int64_t format) {
    return format == HB_NF4 ? kNf4LiftInBfloat16 : kFp4Lift;
}

// Rows of a call that are multiplied together.
struct DecodedRows {
    int64_t first;  // the first one's place in the call's x and out
    int64_t count;  // at most kRowsPerPass
    char* x;        // x_bytes, the rows as the way to multiply keeps them
};

// A way to multiply: on vectors (vectors.cpp), by columns (columns.cpp), in fixed point (fixed.cpp) or on tiles
// (tiled.cpp).
struct DecodedWay {
    int64_t weight_rows;  // in a unit of work
    // Rows of x that are best multiplied together, at most kRowsPerPass and a multiple of 32.
    int64_t (*most_rows)(const DecodedCall& call);
    // Room for so many rows of x that are multiplied together, no less for more of them; a multiple of 64.
    int64_t (*x_bytes)(const DecodedCall& call, int64_t rows);
    // The pieces that loading so many rows is cut into, and loading some of them.
    int64_t (*x_pieces)(const DecodedCall& call, int64_t rows);
    void (*load_x)(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end);
    // Scratch of one thread for passes of up to so many rows.
    int64_t (*scratch_bytes)(const DecodedCall& call, int64_t rows);
    // The rows against weight rows [begin, end) in units of weight_rows.
    void (*run)(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch);
};
extern const DecodedWay kOnVectors;
#ifdef __x86_64__
extern const DecodedWay kOnTiles;
extern const DecodedWay kByColumns;
extern const DecodedWay kFewInFixedPoint;
extern const DecodedWay kInFixedPoint;
#endif

// Some rows of a call, as one variant computes them on vectors. Sizes are in values unless a name says bytes.
struct DecodedJob {
    const DecodedCall* call;
    const void* x;          // [rows, stride] as the variant keeps values, zero from K to padded_k
    int64_t rows;           // rows of x in this pass
    int64_t first_row;      // the first one's place in the call's x and out
    int64_t padded_k;       // K rounded up to a whole number of the variant's groups
    int64_t tile_rows;      // weight rows decoded into a tile at a time, a multiple of kWeightRows
    int64_t stride;         // values from one row to the next, of x and of a tile
    int64_t absmax_floats;  // room for the absmax of one weight row
};

// One instruction set's way to compute. Results depend on the variant in their last bits; within one variant a row's
// result is the same whatever the other rows hold and however the work is cut; in an invariant call, and in all of them
// but for bfloat16, also however many the other rows are.
struct DecodedKernels {
    int64_t group;        // values decoded at a time; padded_k is a multiple
    int64_t value_bytes;  // of a value of x, and of a decoded weight
    // Row `row` of the call's x, converted and in the variant's order of values, padded with zeros.
    void (*load_x)(const DecodedCall& call, int64_t row, int64_t padded_k, void* out);
    // All of x against weight rows [begin, end) in units of kWeightRows. Scratch: what scratch_of says, of one thread.
    void (*run)(const DecodedJob& job, int64_t begin, int64_t end, char* scratch);
};

// The variants: of 4-bit weights, and of int8 weights.
struct DecodedVariants {
    DecodedKernels codes4, codes8;
};
extern const DecodedVariants kDecodedBaseline;
#ifdef __x86_64__
extern const DecodedVariants kDecodedAvx2;
extern const DecodedVariants kDecodedAvx512;
extern const DecodedVariants kDecodedAvx512Bf16;
#endif

// Scratch of one thread, in bytes; each part is a multiple of 64.
struct DecodedScratch {
    int64_t tile_bytes;
    int64_t absmax_bytes;  // of kMostTileRows weight rows
    int64_t row_bytes;     // one weight row as float32, for rows that do not begin with a block
    int64_t sums_bytes;
    int64_t bytes() const { return tile_bytes + absmax_bytes + row_bytes + sums_bytes; }
};
DecodedScratch scratch_of(const DecodedJob& job, int64_t value_bytes);

// The products of a group of hb_linear4 (linear4.cpp).
DecodedCalls decoded_calls(const hb_linear4_args* items, int64_t count);

// Runs checked calls; `workspace` has decoded_workspace bytes.
int64_t decoded_workspace(const DecodedCalls& calls, int64_t threads);
void run_decoded(const DecodedCalls& calls, int64_t threads, void* workspace);

}  // namespace hb
