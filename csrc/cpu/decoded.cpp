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

// Of one thread, enough for each of the calls.
int64_t scratch_bytes_of(const DecodedCall* calls, int64_t count, const DecodedKernels& kernels) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        most = std::max(most, scratch_of(job_for(calls[i], kernels), kernels.value_bytes).bytes());
    }
    return most;
}

// Units [begin, end) of all the calls' weight rows, one call behind the other.
void run_units(const DecodedJob* jobs, int64_t count, const DecodedKernels& kernels, int64_t begin, int64_t end,
               char* scratch) {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const int64_t units = ceil_div(jobs[i].call->N, kWeightRows);
        const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, units);
        if (from < to) kernels.run(jobs[i], from, to, scratch);
        first += units;
    }
}

}  // namespace

int64_t decoded_threads(const DecodedCall* calls, int64_t count, int64_t threads) {
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) columns += calls[i].N;
    return threads_for_matmul(threads, calls[0].M, columns, calls[0].K);
}

DecodedScratch scratch_of(const DecodedJob& job, int64_t value_bytes) {
    const int64_t floats = sizeof(float);
    return {round_up(job.tile_rows * job.stride * value_bytes, 64), kMostTileRows * job.absmax_floats * floats,
            round_up(job.padded_k * floats, 64), kMostTileRows * 6 * floats};
}

int64_t decoded_workspace(const DecodedCall* calls, int64_t count, bool is_int8, int64_t threads) {
    if (tiled_kernels(calls[0].x_dtype, is_int8) != nullptr) return tiled_workspace(calls, count, threads);
    const DecodedKernels& kernels = kernels_for(calls[0], is_int8);
    return x_bytes(job_for(calls[0], kernels), kernels) +
           decoded_threads(calls, count, threads) * scratch_bytes_of(calls, count, kernels);
}

void run_decoded(const DecodedCall* calls, int64_t count, bool is_int8, int64_t most_threads, void* workspace) {
    if (const TiledKernels* const tiles = tiled_kernels(calls[0].x_dtype, is_int8)) {
        return run_tiled(*tiles, calls, count, most_threads, workspace);
    }
    const DecodedCall& first = calls[0];
    const DecodedKernels& kernels = kernels_for(first, is_int8);
    const int64_t threads = decoded_threads(calls, count, most_threads);
    const int64_t scratch_bytes = scratch_bytes_of(calls, count, kernels);
    DecodedJob jobs[HB_MAX_GROUP];
    int64_t units = 0;
    for (int64_t i = 0; i < count; ++i) {
        jobs[i] = job_for(calls[i], kernels);
        jobs[i].x = workspace;
        units += ceil_div(calls[i].N, kWeightRows);
    }
    char* const x = static_cast<char*>(workspace);
    char* const scratch = x + x_bytes(jobs[0], kernels);
    const int64_t row_bytes = jobs[0].stride * kernels.value_bytes, padded_k = jobs[0].padded_k;
    for (int64_t first_row = 0; first_row < first.M; first_row += kRowsPerPass) {
        const int64_t rows = std::min(first.M - first_row, kRowsPerPass);
        parallel_for(threads_for(threads, rows * first.K), rows, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                kernels.load_x(first, first_row + row, padded_k, x + row * row_bytes);
            }
        });
        for (int64_t i = 0; i < count; ++i) jobs[i].first_row = first_row, jobs[i].rows = rows;
        parallel_for(threads, units, [&](int64_t part, int64_t begin, int64_t end) {
            run_units(jobs, count, kernels, begin, end, scratch + part * scratch_bytes);
        });
    }
}

}  // namespace hb
