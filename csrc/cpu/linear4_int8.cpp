// out = x * W^T + bias with W in 4 bits and x rounded to int8: the entry.
//
// Each row of x is cut into groups of 64 columns, each rounded to int8 against its own largest magnitude; the weight's
// table is rounded to int8 too. The product of a group of x with the part of a weight row under one absmax is an exact
// integer; in float32 it is multiplied with (absmax * scale), and added up in the order of K, without contraction:
// every way to compute gives the same bits. This file rounds x, lays out the workspace and cuts the work; with AVX2
// alone fixed.cpp does, for rows of whole groups.
#include "linear4_int8.h"

#include <algorithm>

#include "checks.h"
#include "decoded.h"
#include "fixed.h"
#include "floats.h"
#include "int8.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

bool is_wide(const hb_linear4_args& a) {
#ifdef HB_X86
    return has_avx512() && is_in_groups(a);
#else
    (void)a;
    return false;
#endif
}

// The parts of the workspace, in bytes from its start; each is a multiple of 64.
struct Layout {
    bool wide;
    int64_t rows;                  // of x per pass
    int64_t groups;                // of a row, a multiple of four
    int64_t stride;                // of a row of codes
    int64_t unit;                  // weight rows that are worked on together
    int64_t threads;               // parts
    int64_t row_bytes, run_bytes;  // of one thread: a row of x as values and as codes; what running takes
    int64_t scales_at, offsets_at, row_at, run_at, end;

    explicit Layout(const hb_linear4_args& a)
        : wide(is_wide(a)),
          rows(std::min(a.M, kInt8Rows)),
          groups(round_up(ceil_div(a.K, kGroupValues), 4)),
          // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
          stride((groups * kGroupValues / 64 | 1) * 64),
          unit(kPlainColumns),
          threads(threads_for_matmul(a.call.threads, a.M, a.N, a.K)),
          row_bytes(groups * kGroupValues * (1 + static_cast<int64_t>(sizeof(float)))),
          run_bytes(plain_bytes(a)),
          scales_at(rows * stride),
          offsets_at(scales_at + round_up(rows * groups * 4, 64)),
          row_at(offsets_at + round_up(rows * groups * 4, 64)) {
#ifdef HB_X86
        if (wide) run_bytes = wide_bytes(a), unit = wide_columns(a);
#endif
        run_at = row_at + threads * row_bytes;
        end = run_at + threads * run_bytes;
    }
};

// Groups of values -> codes, and the scale of each code in units of `step`.
HB_CLONES(void, round_groups, (const float* values, int64_t groups, float step, int8_t* codes, float* scales)) {
    for (int64_t group = 0; group < groups; ++group, values += kGroupValues, codes += kGroupValues) {
        const float largest = largest_magnitude(values, kGroupValues);
        const float factor = int8_factor(largest);
        for (int64_t i = 0; i < kGroupValues; ++i) codes[i] = nearest_int8(values[i] * factor);
        scales[group] = largest * step;
    }
}

template <typename T>
T* at(const hb_linear4_args& a, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(a.call.workspace) + offset);
}

// Row first_row + `slot` of x, rounded into the workspace; `part` says whose room for one row is used.
void round_row(const hb_linear4_args& a, const Layout& layout, int64_t first_row, int64_t slot, int64_t part) {
    const int64_t padded = layout.groups * kGroupValues;
    float* const values = at<float>(a, layout.row_at + part * layout.row_bytes);
    int8_t* const codes = at<int8_t>(a, slot * layout.stride);
    load_floats(a.x, a.x_dtype, (first_row + slot) * a.K, a.K, values);
    std::fill(values + a.K, values + padded, 0.0f);
    float* const scales = at<float>(a, layout.scales_at) + slot * layout.groups;
    const float step = int8_step(a.format);
#ifdef HB_X86
    if (layout.wide) {
        int8_t* const natural = reinterpret_cast<int8_t*>(values + padded);
        round_groups(values, layout.groups, step, natural, scales);
        arrange_wide(natural, layout.groups, codes, at<int32_t>(a, layout.offsets_at) + slot * layout.groups);
        return;
    }
#endif
    round_groups(values, layout.groups, step, codes, scales);
}

// The one call, as fixed point computes it where it fits.
DecodedCalls rounding_calls(const hb_linear4_args& a) {
    DecodedCalls calls = decoded_calls(&a, 1);
    calls.at[0].rounds_x = true;
    return calls;
}

}  // namespace

void finish_int8(const Int8Job& job, int64_t row, int64_t n, int64_t columns, float* sums) {
    const hb_linear4_args& a = *job.args;
    for (int64_t i = 0; i < columns && a.bias != nullptr; ++i) sums[i] += load_float(a.bias, a.bias_dtype, n + i);
    store_floats(sums, columns, a.out, a.x_dtype, (job.first_row + row) * a.N + n);
}

}  // namespace hb

extern "C" hb_status hb_linear4_int8_workspace(const hb_linear4_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear4_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    const DecodedCalls calls = rounding_calls(*args);
    *bytes = fits_fixed(calls.at[0]) ? decoded_workspace(calls, args->call.threads) : Layout(*args).end;
    return HB_OK;
}

extern "C" hb_status hb_linear4_int8(const hb_linear4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear4_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const DecodedCalls calls = rounding_calls(a);
    if (fits_fixed(calls.at[0])) {
        HB_REQUIRE(check_workspace(a.call, decoded_workspace(calls, a.call.threads)));
        run_decoded(calls, a.call.threads, a.call.workspace);
        return HB_OK;
    }
    const Layout layout(a);
    HB_REQUIRE(check_workspace(a.call, layout.end));
    Int8Job job{};
    job.args = &a;
    job.absmax = {a.absmax, a.nested_absmax, a.offset, a.nested_blocksize};
    job.groups = layout.groups;
    job.stride = layout.stride;
    job.codes = at<int8_t>(a, 0);
    job.scales = at<float>(a, layout.scales_at);
    job.offsets = at<int32_t>(a, layout.offsets_at);
    auto run = run_plain;
#ifdef HB_X86
    if (layout.wide) run = run_wide;
#endif
    for (job.first_row = 0; job.first_row < a.M; job.first_row += kInt8Rows) {
        job.rows = std::min(a.M - job.first_row, kInt8Rows);
        parallel_for(threads_for(layout.threads, job.rows * a.K), job.rows,
                     [&](int64_t part, int64_t begin, int64_t end) {
                         for (int64_t row = begin; row < end; ++row) round_row(a, layout, job.first_row, row, part);
                     });
        parallel_for(layout.threads, ceil_div(a.N, layout.unit), [&](int64_t part, int64_t begin, int64_t end) {
            run(job, begin * layout.unit, std::min(end * layout.unit, a.N),
                at<char>(a, layout.run_at + part * layout.run_bytes));
        });
    }
    return HB_OK;
}
