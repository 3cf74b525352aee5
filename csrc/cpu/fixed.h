// Products with decoded weights in 16-bit fixed point, for processors with AVX2 alone: what their ways (fixed.cpp) and
// their kernels (fixed_x_avx2.cpp, fixed_avx2.cpp) share.
//
// AVX2 multiplies 16-bit integers, two neighbours of each to one sum of 32 bits, at twice the rate of float32. So each
// row of x is cut into groups of 64 columns that share a power of two, by which they become integers of as many bits as
// keep a group's sum below 2^31, and the table of 4-bit codes is kept in integers of 13 bits; int8 codes are what they
// are. A group's sum is exact, and is multiplied by absmax and the group's power of two in float32, where groups are
// added up in the order of K.
//
// What is rounded weighs less than what dequantized weights lose in bfloat16: csrc/README.md has the figures.
//
// Activations that a call wants rounded to int8 go the same way, with the codes, the table and the order of roundings
// that linear4_int8.cpp says.
#pragma once

#include <stdint.h>

#include "checks.h"
#include "decoded.h"

namespace hb {

constexpr int64_t kFixedGroup = 64;      // columns of x under one power of two
constexpr int kFixedBits4 = 13;          // of a magnitude of x that meets 4-bit codes, at most
constexpr int kFixedBits8 = 15;          // and int8 ones
constexpr int64_t kFewFixedRows = 4;     // of x, at most, that meet codes in registers
constexpr int64_t kFewFixedColumns = 8;  // weight rows that these meet together
constexpr int64_t kFixedColumns = 16;    // weight rows in a panel, which more rows of x meet
constexpr int64_t kFixedPanel = 512;     // of a weight row that a panel has at most: 16 KB, half of a small first cache

// Whether a call is to be computed so: activations in 16 bits or less, whole groups under each absmax, and the level.
bool fits_fixed(const DecodedCall& call);

// The rows of x in a pass's memory, and the scratch of one thread. Each part is a multiple of 64 bytes.
struct FixedLayout {
    int64_t groups;  // of a row
    int64_t stride;  // values from one row of x to the next
    int64_t scales;  // bytes of x before its scales [rows][groups]

    FixedLayout(const DecodedCall& call, int64_t rows);
};
struct FixedScratch {
    int64_t panel, totals;
    int64_t absmax, scales;  // [weight rows][blocks] of the weight, and [groups][weight rows] as they are multiplied by

    FixedScratch(const DecodedCall& call, int64_t rows);  // enough for either way
    int64_t bytes() const { return panel + totals + absmax + scales; }
};

// Rows [begin, end) of the pass -> integers and scales. For weights in 4 bits they have the order of unpacked codes:
// with few rows a group's even columns and then the odd ones, else so of each four columns. Few rows in int8 are bytes,
// with their magnitudes behind them.
void load_fixed_avx2(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end);
// The rows against weight rows [begin, end) in units of kFewFixedColumns and of kFixedColumns. Both give the same bits.
void run_few_fixed_avx2(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch);
void run_fixed_avx2(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch);

}  // namespace hb
