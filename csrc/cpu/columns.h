// Products with decoded weights by columns, for many rows of x: what their way (columns.cpp) and their kernel
// (columns_avx512.cpp) share.
//
// Sixteen weight rows share a vector, a lane each, and a value of x meets all of them at once. So no sum must be added
// up over its lanes, and a panel of 32 weight rows serves eight rows of x from registers:
//
//     panel            k pairs of 32 weight rows, decoded       [pair][row] two bfloat16, neighbours along K
//     x                as it is: a pair of a row is loaded into every lane
//     sums             [8 rows of x][32 weight rows] over a block, float32, in registers
//     totals           [rows of x][32 weight rows]: sums times the block's absmax, added up block by block
#pragma once

#include <stdint.h>

#include "checks.h"
#include "decoded.h"

namespace hb {

// Of x, for weights in 4 and in 8 bits: with fewer, weights that go from register to register are faster.
constexpr int64_t kFewestRows4 = 13, kFewestRows8 = 17;
constexpr int64_t kColumns = 32;       // weight rows in a panel
constexpr int64_t kPanelValues = 256;  // of a weight row that a panel has at most: 16 KB, half of a small first cache
constexpr int64_t kUnitBytes = 4;      // of a row of codes, transposed together

// Whether so many rows of a call are to be computed so: weights in 4 bits whose rows begin with a block, or in 8 whose
// rows are whole units. A block's size is a power of two, so a panel has whole ones, or a block whole panels; in int8 a
// block is a row.
bool fit_columns(const DecodedCall& call, int64_t rows);

// Scratch of one thread, in bytes; each part is a multiple of 64.
struct ColumnsScratch {
    int64_t panel, totals, absmax, scales;

    ColumnsScratch(const DecodedCall& call, int64_t rows);
};

// The rows against weight rows [begin, end) in units of kColumns. For processors with BF16 products and VBMI.
void run_columns_avx512(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch);

}  // namespace hb
