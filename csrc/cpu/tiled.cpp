// Products with decoded weights on tiles: lays out what they work in. tiled_kernel.h computes.
#include "tiled.h"

#include <algorithm>

#include "checks.h"
#include "level.h"

namespace hb {

TiledScratch::TiledScratch(const TileBlocks& blocks, const DecodedCall& call)
    : panel(blocks.panel_bytes()), sums(round_up(blocks.sums() * kUnitBytes, 64)) {
    const int64_t blocksize = std::max<int64_t>(call.weight.blocksize, 1);
    const bool is_nested = call.weight.absmax.nested_absmax != nullptr;
    const int64_t most = is_nested ? kPanelRows * call.K / blocksize + 2 : 0;
    absmax = round_up(most * int64_t{sizeof(float)}, 64);
}

#ifdef HB_X86

namespace {

const TiledKernels& kernels_for(const DecodedCall& call) {
    return call.weight.is_int8 ? kTiledAmx.codes8 : kTiledAmx.codes4;
}

// A group of 64 codes, two tiles long, is decoded at a time.
int64_t row_bytes(const DecodedCall& call) {
    return round_up(call.K, 64) * int64_t{sizeof(uint16_t)};
}

TileBlocks blocks_of(const DecodedCall& call, int64_t rows) {
    return {rows, row_bytes(call)};
}

int64_t most_rows(const DecodedCall& call) {
    return rows_in_cache(row_bytes(call), kRowsPerPass);
}

TiledJob job_for(const DecodedCall& call, const DecodedRows& rows) {
    return {&call, blocks_of(call, rows.count), rows.x, rows.first, rows.count};
}

int64_t x_bytes(const DecodedCall& call, int64_t rows) {
    return blocks_of(call, rows).x_bytes();
}

int64_t x_pieces(const DecodedCall& call, int64_t rows) {
    const TileBlocks blocks = blocks_of(call, rows);
    return blocks.blocks * blocks.pieces();
}

void load_x(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end) {
    const TiledJob job = job_for(call, rows);
    const int64_t pieces = job.blocks.pieces();
    for (int64_t i = begin; i < end; ++i) kernels_for(call).load_x(job, i / pieces, i % pieces);
}

int64_t scratch_bytes(const DecodedCall& call, int64_t rows) {
    return TiledScratch(blocks_of(call, rows), call).bytes();
}

void run(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    kernels_for(call).run(job_for(call, rows), begin, end, scratch);
}

}  // namespace

const DecodedWay kOnTiles = {kPanelRows, most_rows, x_bytes, x_pieces, load_x, scratch_bytes, run};

#endif

}  // namespace hb
