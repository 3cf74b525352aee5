// What linear4.cpp and its variants share: the job of one call, and the table of functions that each variant fills.
#pragma once

#include <stdint.h>

#include "decode4.h"
#include "halfbyte.h"

namespace hb {

constexpr int64_t kWeightRows = 4;  // of a weight, that meet the rows of x together

// Rows of x against the weight, as one variant computes them. Sizes are in values unless a name says bytes.
struct Job4 {
    const hb_linear4_args* args;
    const void* x;          // [rows, stride] as the variant keeps values, zero from K to padded_k
    int64_t rows;           // rows of x in this pass
    int64_t first_row;      // the first one's place in args->x and args->out
    int64_t padded_k;       // K rounded up to a whole number of the variant's groups
    int64_t tile_rows;      // weight rows decoded into a tile at a time, a multiple of kWeightRows
    int64_t stride;         // values from one row to the next, of x and of a tile
    int64_t absmax_floats;  // room for the absmax of one weight row
};

// One instruction set's way to compute. Results depend on the variant in their last bits; within one variant a row's
// result is the same whatever the other rows hold, however many they are, and however the work is cut.
struct Kernels4 {
    int64_t group;        // values decoded at a time; padded_k is a multiple
    int64_t value_bytes;  // of a value of x, and of a decoded weight
    // Row `row` of args->x, converted and in the variant's order of values, padded with zeros.
    void (*load_x)(const hb_linear4_args& args, int64_t row, int64_t padded_k, void* out);
    // All of x against weight rows [begin, end) in units of kWeightRows. Scratch: tile, absmax and sums of one thread.
    void (*run)(const Job4& job, int64_t begin, int64_t end, char* scratch);
};

extern const Kernels4 kLinear4Baseline;
#ifdef __x86_64__
extern const Kernels4 kLinear4Avx2;
extern const Kernels4 kLinear4Avx512;
extern const Kernels4 kLinear4Avx512Bf16;
#endif

// Scratch of one thread, in bytes; each part is a multiple of 64.
struct Scratch4 {
    int64_t tile_bytes;
    int64_t absmax_bytes;  // of kWeightRows weight rows, as stored and side by side
    int64_t row_bytes;     // one weight row as float32, for rows that do not begin with a block
    int64_t sums_bytes;
    int64_t bytes() const { return tile_bytes + absmax_bytes + row_bytes + sums_bytes; }
};
constexpr int64_t kMostTileRows = 32;  // weight rows in a tile, at most
Scratch4 scratch4(const Job4& job, int64_t value_bytes);

}  // namespace hb
