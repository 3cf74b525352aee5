// out = x * W^T + bias with W in 4 bits. The weight is never built: its rows are decoded in registers or, for many rows
// of x, a few dozen at a time into the workspace.
//
// This file chooses the variant and cuts the work; linear4_kernel.h computes. The layout in memory is the checkpoint's
// own: a second one, interleaved by rows, would save one instruction in six and cost a copy, or the copying back.
#include "linear4.h"

#include "checks.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

constexpr int64_t kRowsPerPass = 256;      // rows of x kept converted at a time
constexpr int64_t kTileBytes = 128 << 10;  // of decoded weight: half of a small second cache

const Kernels4& kernels_for(int64_t dtype) {
#ifdef HB_X86
    if (level() >= kAvx512Bf16 && dtype == HB_BFLOAT16) return kLinear4Avx512Bf16;
    if (level() >= kAvx512) return kLinear4Avx512;
    if (level() >= kAvx2) return kLinear4Avx2;
#endif
    (void)dtype;
    return kLinear4Baseline;
}

int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}

int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}

Job4 job_for(const hb_linear4_args& a, const Kernels4& kernels) {
    Job4 job{};
    job.args = &a;
    job.rows = at_most(a.M, kRowsPerPass);
    job.padded_k = round_up(a.K, kernels.group);
    // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
    const int64_t line = 64 / kernels.value_bytes;
    job.stride = (round_up(job.padded_k, line) / line | 1) * line;
    const int64_t fitting = kTileBytes / (job.stride * kernels.value_bytes);
    job.tile_rows = at_least(kWeightRows, at_most(fitting, kMostTileRows) / kWeightRows * kWeightRows);
    job.absmax_floats = round_up(a.K / a.blocksize + 2, 16);
    return job;
}

int64_t x_bytes(const Job4& job, const Kernels4& kernels) {
    return round_up(job.rows * job.stride * kernels.value_bytes, 64);
}

int64_t threads_of(const hb_linear4_args& a) {
    return threads_for(a.call.threads, a.N * (a.K / 8 + 1) * at_most(a.M, 8));
}

}  // namespace

Scratch4 scratch4(const Job4& job, int64_t value_bytes) {
    const int64_t floats = sizeof(float);
    return {round_up(job.tile_rows * job.stride * value_bytes, 64), 2 * kWeightRows * job.absmax_floats * floats,
            round_up(job.padded_k * floats, 64), kMostTileRows * 6 * floats};
}

}  // namespace hb

extern "C" hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    const Kernels4& kernels = kernels_for(args->x_dtype);
    const Job4 job = job_for(*args, kernels);
    *bytes = x_bytes(job, kernels) + threads_of(*args) * scratch4(job, kernels.value_bytes).bytes();
    return HB_OK;
}

extern "C" hb_status hb_linear4(const hb_linear4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const Kernels4& kernels = kernels_for(a.x_dtype);
    Job4 job = job_for(a, kernels);
    const int64_t threads = threads_of(a);
    const int64_t scratch_bytes = scratch4(job, kernels.value_bytes).bytes();
    char* const x = static_cast<char*>(a.call.workspace);
    char* const scratch = x + x_bytes(job, kernels);
    HB_REQUIRE(check_workspace(a.call, x_bytes(job, kernels) + threads * scratch_bytes));

    job.x = x;
    const int64_t row_bytes = job.stride * kernels.value_bytes;
    for (job.first_row = 0; job.first_row < a.M; job.first_row += kRowsPerPass) {
        job.rows = at_most(a.M - job.first_row, kRowsPerPass);
        parallel_for(job.rows < 16 ? 1 : threads, job.rows, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                kernels.load_x(a, job.first_row + row, job.padded_k, x + row * row_bytes);
            }
        });
        parallel_for(threads, ceil_div(a.N, kWeightRows), [&](int64_t part, int64_t begin, int64_t end) {
            kernels.run(job, begin, end, scratch + part * scratch_bytes);
        });
    }
    return HB_OK;
}
