// Chooses the variant of a product with decoded weights, lays out its workspace and cuts the work. decoded_kernel.h
// computes. The layout of weights in memory is the checkpoint's own: a second one, interleaved by rows, would save one
// instruction in six and cost a copy, or the copying back.
#include "decoded.h"

#include <algorithm>

#include "checks.h"
#include "level.h"
#include "pool.h"
#include "tiled.h"

namespace hb {

namespace {

constexpr int64_t kRowsPerPass = 256;      // rows of x kept converted at a time
constexpr int64_t kTileBytes = 128 << 10;  // of decoded weight: half of a small second cache

const DecodedVariants& variants_for(int64_t dtype) {
#ifdef HB_X86
    if (level() >= kAvx512Bf16 && dtype == HB_BFLOAT16) return kDecodedAvx512Bf16;
    if (has_avx512()) return kDecodedAvx512;
    if (level() >= kAvx2) return kDecodedAvx2;
#endif
    (void)dtype;
    return kDecodedBaseline;
}

const DecodedKernels& kernels_for(const DecodedCall& call, bool is_int8) {
    const DecodedVariants& variants = variants_for(call.x_dtype);
    return is_int8 ? variants.codes8 : variants.codes4;
}

DecodedJob job_for(const DecodedCall& call, const DecodedKernels& kernels) {
    DecodedJob job{};
    job.call = &call;
    job.rows = std::min(call.M, kRowsPerPass);
    job.padded_k = round_up(call.K, kernels.group);
    // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
    const int64_t line = 64 / kernels.value_bytes;
    job.stride = (round_up(job.padded_k, line) / line | 1) * line;
    const int64_t fitting = kTileBytes / (job.stride * kernels.value_bytes);
    job.tile_rows = std::max(kWeightRows, std::min(fitting, kMostTileRows) / kWeightRows * kWeightRows);
    job.absmax_floats = round_up(call.K / std::max<int64_t>(call.weight.blocksize, 1) + 2, 16);
    return job;
}

int64_t x_bytes(const DecodedJob& job, const DecodedKernels& kernels) {
    return round_up(job.rows * job.stride * kernels.value_bytes, 64);
}

int64_t threads_of(const DecodedCall& call, int64_t threads) {
    return threads_for_matmul(threads, call.M, call.N, call.K);
}

}  // namespace

DecodedScratch scratch_of(const DecodedJob& job, int64_t value_bytes) {
    const int64_t floats = sizeof(float);
    return {round_up(job.tile_rows * job.stride * value_bytes, 64), kWeightRows * job.absmax_floats * floats,
            round_up(job.padded_k * floats, 64), kMostTileRows * 6 * floats};
}

int64_t decoded_workspace(const DecodedCall& call, bool is_int8, int64_t threads) {
    if (tiled_kernels(call.x_dtype, is_int8) != nullptr) return tiled_workspace(call, threads);
    const DecodedKernels& kernels = kernels_for(call, is_int8);
    const DecodedJob job = job_for(call, kernels);
    return x_bytes(job, kernels) + threads_of(call, threads) * scratch_of(job, kernels.value_bytes).bytes();
}

void run_decoded(const DecodedCall& call, bool is_int8, int64_t most_threads, void* workspace) {
    if (const TiledKernels* const tiles = tiled_kernels(call.x_dtype, is_int8)) {
        return run_tiled(*tiles, call, most_threads, workspace);
    }
    const DecodedKernels& kernels = kernels_for(call, is_int8);
    const int64_t threads = threads_of(call, most_threads);
    DecodedJob job = job_for(call, kernels);
    const int64_t scratch_bytes = scratch_of(job, kernels.value_bytes).bytes();
    char* const x = static_cast<char*>(workspace);
    char* const scratch = x + x_bytes(job, kernels);

    job.x = x;
    const int64_t row_bytes = job.stride * kernels.value_bytes;
    for (job.first_row = 0; job.first_row < call.M; job.first_row += kRowsPerPass) {
        job.rows = std::min(call.M - job.first_row, kRowsPerPass);
        parallel_for(threads_for(threads, job.rows * call.K), job.rows, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                kernels.load_x(call, job.first_row + row, job.padded_k, x + row * row_bytes);
            }
        });
        parallel_for(threads, ceil_div(call.N, kWeightRows), [&](int64_t part, int64_t begin, int64_t end) {
            kernels.run(job, begin, end, scratch + part * scratch_bytes);
        });
    }
}

}  // namespace hb
