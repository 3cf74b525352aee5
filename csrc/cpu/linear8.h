// What linear8.cpp and its variants share: the job of one call, and the table of functions that each variant fills.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "halfbyte.h"
#include "tile_blocks.h"

namespace hb {

constexpr int64_t kQuad = 4;             // weight rows that meet the rows of x together
constexpr int64_t kTileColumns = 32;     // weight rows, columns of the output, that are finished together
constexpr int64_t kWord = 64;            // columns of x in one word of a mask of outliers
constexpr int64_t kWords = 4;            // words whose columns of a tile are unpacked together
constexpr int64_t kExactTerms8 = 65536;  // products, of at most 255 * 128 each, whose sum an int32 holds
constexpr int64_t kStretch8 = 3072;      // columns of six rows of x and four weight rows: 30 KB
static_assert(kStretch8 <= kExactTerms8, "a stretch's sums are exact");

// Rows of x, split into int8 codes and outliers, against the weight.
struct Job8 {
    const hb_linear8_args* args;
    uint8_t* codes;                  // [rows, stride] as the variant keeps them
    float* row_absmax;               // [rows]
    uint64_t* outliers;              // [rows, words] bit k % 64 of word k / 64: column k is an outlier of the row
    int32_t* counts;                 // [rows] outliers of each row
    uint64_t* any_outlier;           // [words] columns that are an outlier of some row of this pass
    const uint64_t* batch_outliers;  // [words] columns that count as outliers for all rows, or null
    float threshold;                 // NaN, which no value reaches, where there is none
    int64_t rows;                    // of x in this pass
    int64_t first_row;               // the first one's place in args->x and args->out
    int64_t stride;                  // bytes from one row of codes to the next
    int64_t words;                   // of a mask
    char* tiles;                     // the codes once more, as tiles take them; only for variants that interleave
    TileBlocks blocks;               // and how they lie there
};

struct Kernels8 {
    // Row first_row + `slot` of x into the job's codes, row_absmax and outliers. `values`: room for K floats.
    void (*split_row)(const Job8& job, int64_t slot, float* values);
    // Sets in `mask` the columns [begin, end) words x kWord that hold an outlier in any row of args->x.
    void (*mark_columns)(const Job8& job, int64_t begin, int64_t end, uint64_t* mask);
    // All rows of the job against weight rows [begin, end) in units of kTileColumns.
    void (*run)(const Job8& job, int64_t begin, int64_t end, float* scratch);
    // Stretch `piece` of the codes of one block of rows -> job.tiles. Null for a variant that reads them where they
    // lie.
    void (*interleave)(const Job8& job, int64_t block, int64_t piece);
};

// Floats that `run` needs for one thread: the outlier terms of a tile, and its columns of kWords words.
constexpr int64_t run_floats(int64_t rows) {
    return (rows + kWords * kWord) * kTileColumns;
}

// Bytes behind those, for panels of weights and their sums on tiles; a second set of sums where int32 does not hold
// them.
HB_INLINE int64_t tile_bytes(const TileBlocks& blocks, int64_t K) {
    return blocks.panel_bytes() + blocks.sums() * (K > kExactTerms8 ? 12 : 4);
}

extern const Kernels8 kLinear8Baseline;
#ifdef __x86_64__
extern const Kernels8 kLinear8Avx2;
extern const Kernels8 kLinear8Avx512;
extern const Kernels8 kLinear8Amx;
#endif

}  // namespace hb
