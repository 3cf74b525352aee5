// LLM.int8(): out = x * W^T + bias with W in int8.
//
// Some rows of x at a time: each is split into outliers (a mask of their columns) and ordinary values
// (rounded to int8 against the largest of them); then every weight row meets every x row. This file chooses the
// variant, lays out the workspace and cuts the work; linear8_kernel.h computes. Every variant gives the same bits.
#include "linear8.h"

#include <math.h>

#include <algorithm>

#include "checks.h"
#include "decoded.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

// Rows of x that tiles are not worth their filling for.
constexpr int64_t kRowsOnVectors = 4;

const Kernels8& kernels_for(const hb_linear8_args& a) {
#ifdef HB_X86
    if (level() >= kAmx && (a.M > kRowsOnVectors || !has_avx512())) return kLinear8Amx;
    if (has_avx512()) return kLinear8Avx512;
    if (has_avx2()) return kLinear8Avx2;
#endif
    (void)a;
    return kLinear8Baseline;
}

int64_t rows_per_pass(const hb_linear8_args& a) {
    return std::min(a.M, kernels_for(a).interleave == nullptr ? kRowsPerPass : rows_in_cache(a.K, kRowsPerPass));
}

// The parts of the workspace, in bytes from its start; each is a multiple of 64.
struct Layout {
    int64_t rows;     // per pass
    int64_t stride;   // of a row of codes
    int64_t words;    // of a mask of columns
    int64_t threads;  // parts
    TileBlocks blocks;
    int64_t absmax_at, counts_at, outliers_at, any_at, batch_at, values_at, tiles_at, run_at, run_bytes, end;

    Layout(const hb_linear8_args& a, int64_t columns)
        : rows(rows_per_pass(a)),
          // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
          stride((ceil_div(a.K, 64) | 1) * 64),
          words(ceil_div(a.K, kWord)),
          threads(threads_for_matmul(a.call.threads, a.M, columns, a.K)),
          blocks(kernels_for(a).interleave == nullptr ? 0 : rows, a.K),
          absmax_at(rows * stride),
          counts_at(absmax_at + round_up(rows * 4, 64)),
          outliers_at(counts_at + round_up(rows * 4, 64)),
          any_at(outliers_at + round_up(rows * words * 8, 64)),
          batch_at(any_at + round_up(words * 8, 64)),
          values_at(batch_at + round_up(words * 8, 64)),
          tiles_at(values_at + threads * round_up(a.K * 4, 64)),
          run_at(tiles_at + round_up(blocks.x_bytes(), 64)),
          run_bytes(run_floats(rows) * 4 + (blocks.blocks == 0 ? 0 : round_up(tile_bytes(blocks, a.K), 64))),
          end(run_at + threads * run_bytes) {}
};

template <typename T>
T* at(const hb_linear8_args& a, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(a.call.workspace) + offset);
}

void split_rows(const Job8& job, const Layout& layout, int64_t threads) {
    parallel_for(threads, job.rows, [&](int64_t part, int64_t begin, int64_t end) {
        float* const values = at<float>(*job.args, layout.values_at + part * round_up(job.args->K * 4, 64));
        for (int64_t slot = begin; slot < end; ++slot) kernels_for(*job.args).split_row(job, slot, values);
    });
    for (int64_t word = 0; word < job.words; ++word) {
        job.any_outlier[word] = 0;
        for (int64_t row = 0; row < job.rows; ++row) job.any_outlier[word] |= job.outliers[row * job.words + word];
    }
}

void interleave_rows(Job8& job, int64_t threads) {
    job.blocks = TileBlocks(job.rows, job.args->K);
    const int64_t pieces = job.blocks.pieces();
    parallel_for(threads, job.blocks.blocks * pieces, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels_for(*job.args).interleave(job, i / pieces, i % pieces);
    });
}

// Tiles [begin, end) of all the items' columns, one item behind the other.
void run_tiles(const Job8* jobs, int64_t count, int64_t begin, int64_t end, float* scratch) {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const int64_t tiles = ceil_div(jobs[i].args->N, kTileColumns);
        const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, tiles);
        if (from < to) kernels_for(*jobs[i].args).run(jobs[i], from, to, scratch);
        first += tiles;
    }
}

// The parts of the workspace that all products share, and the options.
Job8 shared_job(const hb_linear8_args& a, const Layout& layout) {
    Job8 job{};
    job.args = &a;
    job.codes = at<uint8_t>(a, 0);
    job.row_absmax = at<float>(a, layout.absmax_at);
    job.counts = at<int32_t>(a, layout.counts_at);
    job.outliers = at<uint64_t>(a, layout.outliers_at);
    job.any_outlier = at<uint64_t>(a, layout.any_at);
    job.threshold = a.threshold > 0 ? static_cast<float>(a.threshold) : NAN;
    job.tiles = at<char>(a, layout.tiles_at);
    job.stride = layout.stride;
    job.words = layout.words;
    if (a.outlier_rule == HB_OUTLIERS_BATCH) {
        uint64_t* const batch = at<uint64_t>(a, layout.batch_at);
        parallel_for(threads_for(layout.threads, a.M * a.K), job.words,
                     [&](int64_t, int64_t begin, int64_t end) { kernels_for(a).mark_columns(job, begin, end, batch); });
        job.batch_outliers = batch;
    }
    return job;
}

void run_int8(const hb_linear8_args* items, int64_t count, const Layout& layout) {
    const hb_linear8_args& first = *items;
    Job8 job = shared_job(first, layout);
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) tiles += ceil_div(items[i].N, kTileColumns);
    for (job.first_row = 0; job.first_row < first.M; job.first_row += layout.rows) {
        job.rows = std::min(first.M - job.first_row, layout.rows);
        const int64_t row_threads = threads_for(layout.threads, job.rows * first.K);
        split_rows(job, layout, row_threads);
        if (kernels_for(first).interleave != nullptr) interleave_rows(job, row_threads);
        Job8 jobs[HB_MAX_GROUP];
        for (int64_t i = 0; i < count; ++i) {
            jobs[i] = job;
            jobs[i].args = items + i;
        }
        parallel_for(layout.threads, tiles, [&](int64_t part, int64_t begin, int64_t end) {
            run_tiles(jobs, count, begin, end, at<float>(first, layout.run_at + part * layout.run_bytes));
        });
    }
}

DecodedCall decoded_call(const hb_linear8_args& a) {
    const AbsmaxSource absmax = {a.absmax, nullptr, nullptr, 1};
    const DecodedWeight weight = {reinterpret_cast<const uint8_t*>(a.codes), 0, a.K, absmax, true};
    return {a.x, a.x_dtype, a.M, a.N, a.K, weight, a.bias, a.bias_dtype, a.out, a.N, false};
}

DecodedCalls decoded_calls(const hb_linear8_args* items, int64_t count) {
    DecodedCalls calls{};
    calls.count = count;
    calls.experts = 1;
    for (int64_t i = 0; i < count; ++i) {
        calls.at[i] = decoded_call(items[i]);
        calls.at[i].batch_invariant = items->call.batch_invariant != 0;
    }
    return calls;
}

int64_t columns_of(const hb_linear8_args* items, int64_t count) {
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) columns += items[i].N;
    return columns;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_group_workspace(const hb_linear8_args* items, int64_t count, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_group(items, count, check_linear8_shape));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    if (items->outlier_rule == HB_OUTLIERS_ALL) {
        *bytes = decoded_workspace(decoded_calls(items, count), items->call.threads);
    } else {
        *bytes = Layout(*items, columns_of(items, count)).end;
    }
    return HB_OK;
}

extern "C" hb_status hb_linear8_group(const hb_linear8_args* items, int64_t count) {
    using namespace hb;
    HB_REQUIRE(check_linear8_group(items, count, check));
    if (!has_output(items, count)) return HB_OK;
    const hb_call& call = items->call;
    int64_t needed = 0;
    HB_REQUIRE(hb_linear8_group_workspace(items, count, &needed));
    HB_REQUIRE(check_workspace(call, needed));
    if (items->outlier_rule == HB_OUTLIERS_ALL) {
        run_decoded(decoded_calls(items, count), call.threads, call.workspace);
    } else {
        run_int8(items, count, Layout(*items, columns_of(items, count)));
    }
    return HB_OK;
}

extern "C" hb_status hb_linear8_workspace(const hb_linear8_args* args, int64_t* bytes) {
    return hb_linear8_group_workspace(args, 1, bytes);
}

extern "C" hb_status hb_linear8(const hb_linear8_args* args) {
    return hb_linear8_group(args, 1);
}
