// Products of bfloat16 activations with weights that are decoded on the way, on tiles: what tiled.cpp, the way to
// multiply where the level has them, and the variants share.
//
// All rows are added up in one order, however many they are: decoding costs more than multiplying up to 32 rows does.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "decoded.h"
#include "tile_blocks.h"

namespace hb {

// Some rows of a call.
struct TiledJob {
    const DecodedCall* call;
    TileBlocks blocks;
    char* x;            // blocks.x_bytes(), in the order in which codes are decoded, zero beyond K
    int64_t first_row;  // the first one's place in the call's x and out
    int64_t rows;
};

struct TiledKernels {
    // Stretch `piece` of the rows of one block -> job.x.
    void (*load_x)(const TiledJob& job, int64_t block, int64_t piece);
    // All of x against weight rows [begin, end) in units of kPanelRows. Scratch: tiled_scratch bytes, of one thread.
    void (*run)(const TiledJob& job, int64_t begin, int64_t end, char* scratch);
};

// Of 4-bit weights, and of int8 weights.
struct TiledVariants {
    TiledKernels codes4, codes8;
};
#ifdef __x86_64__
extern const TiledVariants kTiledAmx;
#endif

// The parts of one thread's scratch, in bytes; each is a multiple of 64.
struct TiledScratch {
    int64_t panel, absmax, sums;
    TiledScratch(const TileBlocks& blocks, const DecodedCall& call);
    HB_INLINE int64_t bytes() const { return panel + absmax + sums; }
};

}  // namespace hb
