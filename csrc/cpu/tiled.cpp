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

// Of one thread, enough for each of the calls.
int64_t scratch_bytes_of(const DecodedCall* calls, int64_t count, const TileBlocks& blocks) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, TiledScratch(blocks, calls[i]).bytes());
    return most;
}

// Units [begin, end) of all the calls' weight rows, one call behind the other.
void run_units(const TiledKernels& kernels, TiledJob job, const DecodedCall* calls, int64_t count, int64_t begin,
               int64_t end, char* scratch) {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const int64_t units = ceil_div(calls[i].N, kTileRows);
        const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, units);
        job.call = calls + i;
        if (from < to) kernels.run(job, from, to, scratch);
        first += units;
    }
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

int64_t tiled_workspace(const DecodedCall* calls, int64_t count, int64_t threads) {
    const TileBlocks blocks = blocks_of(calls[0], std::min(calls[0].M, kRowsPerPass));
    return round_up(blocks.x_bytes(), 64) +
           decoded_threads(calls, count, threads) * scratch_bytes_of(calls, count, blocks);
}

void run_tiled(const TiledKernels& kernels, const DecodedCall* calls, int64_t count, int64_t most_threads,
               void* workspace) {
    const DecodedCall& first = calls[0];
    const int64_t threads = decoded_threads(calls, count, most_threads);
    const TileBlocks most = blocks_of(first, std::min(first.M, kRowsPerPass));
    TiledJob job{};
    job.call = &first;
    job.x = static_cast<char*>(workspace);
    char* const scratch = job.x + round_up(most.x_bytes(), 64);
    const int64_t scratch_bytes = scratch_bytes_of(calls, count, most);
    int64_t units = 0;
    for (int64_t i = 0; i < count; ++i) units += ceil_div(calls[i].N, kTileRows);
    for (job.first_row = 0; job.first_row < first.M; job.first_row += kRowsPerPass) {
        job.rows = std::min(first.M - job.first_row, kRowsPerPass);
        job.blocks = blocks_of(first, job.rows);
        const int64_t pieces = job.blocks.pieces();
        parallel_for(threads_for(threads, job.rows * first.K), job.blocks.blocks * pieces,
                     [&](int64_t, int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) kernels.load_x(job, i / pieces, i % pieces);
                     });
        parallel_for(threads, units, [&](int64_t part, int64_t begin, int64_t end) {
            run_units(kernels, job, calls, count, begin, end, scratch + part * scratch_bytes);
        });
    }
}

}  // namespace hb
