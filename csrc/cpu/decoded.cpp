// Products with decoded weights: chooses the way to multiply, lays out its workspace and cuts the work. vectors.cpp,
// columns.cpp, fixed.cpp and tiled.cpp multiply.
//
// Rows of x are taken in waves, and a wave in passes of some rows, evenly many, that meet the same weights: those of
// one expert, or of all rows where there are none. A wave is loaded, then multiplied, all of its passes and calls in
// one region of threads:
//
//     steps of a wave:   | pass: rows of expert 2         | pass: of expert 5   | pass: of expert 7 ...
//     units of a pass:   | call 0: weight rows 0 .. N-1   | call 1 ...
//
// A unit of weight rows counts as many steps as it takes time, so that threads get equal shares of it where one expert
// has hundreds of rows and another one row. An expert without rows has no pass, and nothing of it is read.
#include "decoded.h"

#include <algorithm>

#include "checks.h"
#include "columns.h"
#include "fixed.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

constexpr int64_t kRowsPerWave = 1024;  // where rows are those of experts
// What decoding a weight takes, where a row of x that meets it takes one: so 8 rows and 64 compared on vectors (Zen 4).
// On tiles it is about 50, and nothing but the shares of experts depends on it.
constexpr int64_t kDecodingSteps = 8;

// Tiles take as long for one row as for many, and vectors less for these few: memory is what they wait for.
constexpr int64_t kRowsOnVectors = 3;

// For a call's part in a pass of so many rows.
const DecodedWay& way_for(const DecodedCall& call, int64_t rows) {
#ifdef HB_X86
    const bool may_take_vectors = rows <= kRowsOnVectors && !call.batch_invariant && has_avx512();
    if (level() >= kAmx && call.x_dtype == HB_BFLOAT16 && !may_take_vectors) return kOnTiles;
    if (!call.batch_invariant && fit_columns(call, rows)) return kByColumns;
    if (fits_fixed(call)) return rows <= kFewFixedRows ? kFewInFixedPoint : kInFixedPoint;
#endif
    (void)call, (void)rows;
    return kOnVectors;
}

// The way that x is loaded for: that of the first call which wants it loaded. There is one such way at most: calls that
// differ in whether they fit fixed point are not made together, and by columns x stays where it is.
const DecodedWay& loading_way(const DecodedCalls& calls, int64_t rows) {
    for (int64_t i = 0; i < calls.count; ++i) {
        const DecodedWay& way = way_for(calls.at[i], rows);
        if (way.x_pieces(calls.at[i], rows) > 0) return way;
    }
    return way_for(calls.at[0], rows);
}

// The most that a pass has.
int64_t most_rows(const DecodedCall& call) {
    return way_for(call, kRowsPerPass).most_rows(call);
}

// What the next pass takes of so many.
int64_t rows_of_pass(const DecodedCall& call, int64_t left) {
    const int64_t passes = ceil_div(left, most_rows(call));
    return std::min(left, round_up(ceil_div(left, passes), 32));
}

struct Pass {
    int64_t expert;
    const DecodedWay* way;  // that x is loaded for
    DecodedRows rows;
    int64_t unit_rows;  // of a weight, in the largest unit of the calls' ways
    int64_t steps;      // of a row of the weight

    int64_t unit_steps() const { return steps * unit_rows; }
};

// Passes over the rows of x, one expert's after the other's.
class Passes {
  public:
    explicit Passes(const DecodedCalls& calls) : calls_(calls) { step_to_rows(); }
    bool is_done() const { return expert_ == calls_.experts; }
    int64_t next_count() const { return rows_of_pass(calls_.at[0], end() - first_); }
    int64_t next_x_bytes() const { return loading_way(calls_, next_count()).x_bytes(calls_.at[0], next_count()); }
    Pass take() {
        const int64_t count = next_count();
        Pass pass = {expert_, &loading_way(calls_, count), {first_, count, nullptr}, 0, count + kDecodingSteps};
        for (int64_t i = 0; i < calls_.count; ++i) {
            pass.unit_rows = std::max(pass.unit_rows, way_for(calls_.at[i], count).weight_rows);
        }
        first_ += count;
        step_to_rows();
        return pass;
    }

  private:
    int64_t end() const { return calls_.ends == nullptr ? calls_.at[0].M : calls_.ends[expert_]; }
    void step_to_rows() {
        while (expert_ < calls_.experts && first_ == end()) ++expert_;
    }

    const DecodedCalls& calls_;
    int64_t expert_ = 0, first_ = 0;
};

int64_t rows_per_wave(const DecodedCalls& calls) {
    return std::min(calls.at[0].M, calls.ends == nullptr ? most_rows(calls.at[0]) : kRowsPerWave);
}

// The ways that passes of a call may go: that of many rows, and that of few.
template <typename Size>
int64_t most_of_ways(const DecodedCall& call, const Size& size) {
    return std::max(size(way_for(call, kRowsPerPass)), size(way_for(call, std::min(call.M, kRowsOnVectors))));
}

// Room for a wave's x. Where rows are those of experts, any number of passes may go either way.
int64_t wave_bytes(const DecodedCalls& calls) {
    const DecodedCall& call = calls.at[0];
    const int64_t rows = rows_per_wave(calls);
    if (calls.ends == nullptr) return loading_way(calls, rows).x_bytes(call, rows);
    return most_of_ways(call, [&](const DecodedWay& way) { return way.x_bytes(call, rows); });
}

template <typename T>
void advance(const T*& pointer, int64_t elements) {
    if (pointer != nullptr) pointer += elements;
}

void advance(const void*& pointer, int64_t bytes) {
    if (pointer != nullptr) pointer = static_cast<const char*>(pointer) + bytes;
}

// Of one thread, enough for each of the calls.
int64_t scratch_bytes_of(const DecodedCalls& calls) {
    const int64_t rows = std::min(calls.at[0].M, most_rows(calls.at[0]));
    int64_t most = 0;
    for (int64_t i = 0; i < calls.count; ++i) {
        const DecodedCall& call = calls.at[i];
        most = std::max(most, most_of_ways(call, [&](const DecodedWay& way) { return way.scratch_bytes(call, rows); }));
    }
    return most;
}

int64_t threads_of(const DecodedCalls& calls, int64_t threads) {
    int64_t columns = 0;
    for (int64_t i = 0; i < calls.count; ++i) columns += calls.at[i].N;
    return threads_for_matmul(threads, calls.at[0].M, columns, calls.at[0].K);
}

// Calls body(i, from, to) for what [begin, end) has of each of `count` ranges that lie one behind the other.
template <typename Size, typename Body>
void for_ranges(int64_t count, const Size& size, int64_t begin, int64_t end, const Body& body) {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const int64_t own = size(i);
        const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, own);
        if (from < to) body(i, from, to);
        first += own;
    }
}

// Passes that are loaded, then run, together.
struct Wave {
    const DecodedCalls& calls;
    Pass passes[kRowsPerWave];
    int64_t count, rows;

    explicit Wave(const DecodedCalls& all) : calls(all), count(0), rows(0) {}

    static int64_t units_of(const DecodedCall& call, const Pass& pass) { return ceil_div(call.N, pass.unit_rows); }

    // As many passes as `bytes` hold at x, one at least.
    void fill(Passes& all, char* x, int64_t bytes) {
        const int64_t most = rows_per_wave(calls);
        const char* const end = x + bytes;
        count = rows = 0;
        while (!all.is_done() && rows + all.next_count() <= most && all.next_x_bytes() <= end - x) {
            const int64_t taken = all.next_x_bytes();
            Pass& pass = passes[count++] = all.take();
            pass.rows.x = x;
            rows += pass.rows.count;
            x += taken;
        }
    }

    void load(int64_t threads) const {
        const DecodedCall& first = calls.at[0];
        const auto pieces = [&](int64_t i) { return passes[i].way->x_pieces(first, passes[i].rows.count); };
        int64_t all = 0;
        for (int64_t i = 0; i < count; ++i) all += pieces(i);
        parallel_for(threads_for(threads, rows * first.K), all, [&](int64_t, int64_t begin, int64_t end) {
            for_ranges(count, pieces, begin, end, [&](int64_t i, int64_t from, int64_t to) {
                passes[i].way->load_x(first, passes[i].rows, from, to);
            });
        });
    }

    void run(int64_t threads, char* scratch, int64_t scratch_bytes) const {
        const auto steps = [&](int64_t i) { return units(passes[i]) * passes[i].unit_steps(); };
        int64_t all = 0;
        for (int64_t i = 0; i < count; ++i) all += steps(i);
        parallel_for(threads, all, [&](int64_t part, int64_t begin, int64_t end) {
            for_ranges(count, steps, begin, end, [&](int64_t i, int64_t from, int64_t to) {
                // A unit is whose range has its first step.
                const int64_t own = passes[i].unit_steps();
                run_units(passes[i], ceil_div(from, own), ceil_div(to, own), scratch + part * scratch_bytes);
            });
        });
    }

    int64_t units(const Pass& pass) const {
        int64_t all = 0;
        for (int64_t i = 0; i < calls.count; ++i) all += units_of(calls.at[i], pass);
        return all;
    }

    void run_units(const Pass& pass, int64_t begin, int64_t end, char* scratch) const {
        for_ranges(
            calls.count, [&](int64_t i) { return units_of(calls.at[i], pass); }, begin, end,
            [&](int64_t i, int64_t from, int64_t to) {
                const DecodedCall call = moved(calls.at[i], calls.strides, pass.expert * calls.count);
                const DecodedWay& way = way_for(call, pass.rows.count);
                const int64_t units = pass.unit_rows / way.weight_rows;
                way.run(call, pass.rows, from * units, std::min(to * units, ceil_div(call.N, way.weight_rows)),
                        scratch);
            });
    }
};

// Calls that keep x in one form.
void run_together(const DecodedCalls& calls, int64_t most_threads, void* workspace) {
    const int64_t threads = threads_of(calls, most_threads), scratch_bytes = scratch_bytes_of(calls);
    const int64_t x_bytes = wave_bytes(calls);
    char* const x = static_cast<char*>(workspace);
    Wave wave(calls);
    for (Passes passes(calls); !passes.is_done();) {
        wave.fill(passes, x, x_bytes);
        wave.load(threads);
        wave.run(threads, x + x_bytes, scratch_bytes);
    }
}

// Calls body(some) for all calls, or, where they do not keep x in one form, for one after the other.
template <typename Body>
void for_each_together(const DecodedCalls& calls, const Body& body) {
    int64_t fixed = 0;
    for (int64_t i = 0; i < calls.count; ++i) fixed += fits_fixed(calls.at[i]);
    if (fixed == 0 || fixed == calls.count) return body(calls);
    for (int64_t i = 0; i < calls.count; ++i) {
        DecodedCalls one = calls;
        one.at[0] = calls.at[i];
        one.count = 1;
        body(one);
    }
}

}  // namespace

DecodedCall moved(DecodedCall call, const MatrixStrides& strides, int64_t matrices) {
    AbsmaxSource& absmax = call.weight.absmax;
    const int64_t absmax_bytes = absmax.nested_absmax == nullptr ? int64_t{sizeof(float)} : 1;
    advance(call.weight.codes, matrices * strides.codes);
    advance(absmax.absmax, matrices * strides.absmax * absmax_bytes);
    advance(absmax.nested_absmax, matrices * strides.nested_absmax);
    advance(absmax.offset, matrices * strides.offset);
    advance(call.bias, matrices * strides.bias * dtype_bytes(call.bias_dtype));
    return call;
}

int64_t decoded_workspace(const DecodedCalls& calls, int64_t threads) {
    int64_t most = 0;
    for_each_together(calls, [&](const DecodedCalls& some) {
        most = std::max(most, wave_bytes(some) + threads_of(some, threads) * scratch_bytes_of(some));
    });
    return most;
}

void run_decoded(const DecodedCalls& calls, int64_t threads, void* workspace) {
    for_each_together(calls, [&](const DecodedCalls& some) { run_together(some, threads, workspace); });
}

}  // namespace hb