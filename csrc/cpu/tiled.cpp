// Lays out the workspace of a product on tiles and cuts the work. tiled_kernel.h computes.
#include "tiled.h"

#include <algorithm>

#include "checks.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

constexpr int64_t kRowsPerPass = 256;  // rows of x kept at a time

TileBlocks blocks_of(const DecodedCall& call, int64_t rows) {
    // A group of 64 codes, two tiles long, is decoded at a time.
    return {rows, round_up(call.K, 64) * int64_t{sizeof(uint16_t)}};
}

}  // namespace

TiledScratch::TiledScratch(const TileBlocks& blocks, const DecodedCall& call)
    : panel(blocks.panel_rows() * kPanelStride), sums(round_up(blocks.sums() * kUnitBytes, 64)) {
    const int64_t blocksize = std::max<int64_t>(call.weight.blocksize, 1);
    const bool is_nested = call.weight.absmax.nested_absmax != nullptr;
    const int64_t most = is_nested ? blocks.panel_rows() * call.K / blocksize + 2 : 0;
    absmax = round_up(most * int64_t{sizeof(float)}, 64);
}

const TiledKernels* tiled_kernels(int64_t x_dtype, bool is_int8) {
#ifdef HB_X86
    if (level() >= kAmx && x_dtype == HB_BFLOAT16) return is_int8 ? &kTiledAmx.codes8 : &kTiledAmx.codes4;
#endif
    (void)x_dtype, (void)is_int8;
    return nullptr;
}

int64_t tiled_workspace(const DecodedCall& call, int64_t threads) {
    const TileBlocks blocks = blocks_of(call, std::min(call.M, kRowsPerPass));
    const int64_t parts = threads_for_matmul(threads, call.M, call.N, call.K);
    return round_up(blocks.x_bytes(), 64) + parts * TiledScratch(blocks, call).bytes();
}

void run_tiled(const TiledKernels& kernels, const DecodedCall& call, int64_t most_threads, void* workspace) {
    const int64_t threads = threads_for_matmul(most_threads, call.M, call.N, call.K);
    const TileBlocks most = blocks_of(call, std::min(call.M, kRowsPerPass));
    TiledJob job{};
    job.call = &call;
    job.x = static_cast<char*>(workspace);
    char* const scratch = job.x + round_up(most.x_bytes(), 64);
    const int64_t scratch_bytes = TiledScratch(most, call).bytes();
    for (job.first_row = 0; job.first_row < call.M; job.first_row += kRowsPerPass) {
        job.rows = std::min(call.M - job.first_row, kRowsPerPass);
        job.blocks = blocks_of(call, job.rows);
        const int64_t pieces = job.blocks.pieces();
        parallel_for(threads_for(threads, job.rows * call.K), job.blocks.blocks * pieces,
                     [&](int64_t, int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) kernels.load_x(job, i / pieces, i % pieces);
                     });
        parallel_for(threads, ceil_div(call.N, kTileRows), [&](int64_t part, int64_t begin, int64_t end) {
            kernels.run(job, begin, end, scratch + part * scratch_bytes);
        });
    }
}

}  // namespace hb
