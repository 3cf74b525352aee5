// Products of float activations with weights that are decoded on the way: what the entries (linear4.cpp, and
// linear8.cpp for weights alone in int8) and the variants (decoded_<level>.cpp) share.
#pragma once

#include <stdint.h>

#include "decode4.h"
#include "halfbyte.h"

namespace hb {

constexpr int64_t kWeightRows = 4;     // of a weight, that meet the rows of x together
constexpr int64_t kMostTileRows = 32;  // weight rows in a tile, at most

// A packed weight [N, K] and where its values come from.
struct DecodedWeight {
    const uint8_t* codes;  // two in a byte of the flattened weight, or int8 [N, K]
    int64_t format;        // of 4-bit codes; ignored for int8
    int64_t blocksize;     // codes under one absmax; K for int8
    AbsmaxSource absmax;   // [ceil(N * K / blocksize)]
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
    bool batch_invariant;  // as hb_call has it
};

// Some rows of a call, as one variant computes them. Sizes are in values unless a name says bytes.
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
    int64_t absmax_bytes;  // of kWeightRows weight rows
    int64_t row_bytes;     // one weight row as float32, for rows that do not begin with a block
    int64_t sums_bytes;
    int64_t bytes() const { return tile_bytes + absmax_bytes + row_bytes + sums_bytes; }
};
DecodedScratch scratch_of(const DecodedJob& job, int64_t value_bytes);

// Worth using for calls that have M and K in common.
int64_t decoded_threads(const DecodedCall* calls, int64_t count, int64_t threads);

// Runs checked calls that have x, M and K in common; `workspace` has decoded_workspace bytes.
int64_t decoded_workspace(const DecodedCall* calls, int64_t count, bool is_int8, int64_t threads);
void run_decoded(const DecodedCall* calls, int64_t count, bool is_int8, int64_t threads, void* workspace);

}  // namespace hb
