// Products with decoded weights on vectors: chooses the variant and lays out what it works in. decoded_kernel.h
// computes. The layout of weights in memory is the checkpoint's own: a second one, interleaved by rows, would save one
// instruction in six and cost a copy, or the copying back.
#include <algorithm>

#include "checks.h"
#include "decoded.h"
#include "level.h"

namespace hb {

namespace {

constexpr int64_t kTileBytes = 128 << 10;  // of decoded weight: half of a small second cache

const DecodedVariants& variants_for(int64_t dtype) {
#ifdef HB_X86
    // Where there are tiles, products of float32 are faster than those of bfloat16 (level.cpp).
    if (level() == kAvx512Bf16 && dtype == HB_BFLOAT16) return kDecodedAvx512Bf16;
    if (has_avx512()) return kDecodedAvx512;
    if (has_avx2()) return kDecodedAvx2;
#endif
    (void)dtype;
    return kDecodedBaseline;
}

const DecodedKernels& kernels_for(const DecodedCall& call) {
    const DecodedVariants& variants = variants_for(call.x_dtype);
    return call.weight.is_int8 ? variants.codes8 : variants.codes4;
}

DecodedJob job_for(const DecodedCall& call, const DecodedKernels& kernels) {
    DecodedJob job{};
    job.call = &call;
    job.padded_k = round_up(call.K, kernels.group);
    // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
    const int64_t line = 64 / kernels.value_bytes;
    job.stride = (round_up(job.padded_k, line) / line | 1) * line;
    const int64_t fitting = kTileBytes / (job.stride * kernels.value_bytes);
    job.tile_rows = std::max(kWeightRows, std::min(fitting, kMostTileRows) / kWeightRows * kWeightRows);
    job.absmax_floats = round_up(call.K / std::max<int64_t>(call.weight.blocksize, 1) + 2, 16);
    return job;
}

int64_t most_rows(const DecodedCall&) {
    return kRowsPerPass;
}

int64_t x_bytes(const DecodedCall& call, int64_t rows) {
    const DecodedKernels& kernels = kernels_for(call);
    return rows * job_for(call, kernels).stride * kernels.value_bytes;
}

int64_t x_pieces(const DecodedCall&, int64_t rows) {
    return rows;
}

void load_x(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end) {
    const DecodedKernels& kernels = kernels_for(call);
    const DecodedJob job = job_for(call, kernels);
    for (int64_t row = begin; row < end; ++row) {
        kernels.load_x(call, rows.first + row, job.padded_k, rows.x + row * job.stride * kernels.value_bytes);
    }
}

int64_t scratch_bytes(const DecodedCall& call, int64_t) {
    const DecodedKernels& kernels = kernels_for(call);
    return scratch_of(job_for(call, kernels), kernels.value_bytes).bytes();
}

void run(const DecodedCall& call, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    const DecodedKernels& kernels = kernels_for(call);
    DecodedJob job = job_for(call, kernels);
    job.x = rows.x;
    job.rows = rows.count;
    job.first_row = rows.first;
    kernels.run(job, begin, end, scratch);
}

}  // namespace

DecodedScratch scratch_of(const DecodedJob& job, int64_t value_bytes) {
    const int64_t floats = sizeof(float);
    return {round_up(job.tile_rows * job.stride * value_bytes, 64), kMostTileRows * job.absmax_floats * floats,
            round_up(job.padded_k * floats, 64), kMostTileRows * kMostRowsTogether * floats};
}

const DecodedWay kOnVectors = {kWeightRows, most_rows, x_bytes, x_pieces, load_x, scratch_bytes, run};

}  // namespace hb
