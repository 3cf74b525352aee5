// LLM.int8(): out = x * W^T + bias with W in int8.
//
// Up to kRowsPerPass rows of x at a time: each is split into outliers (kept with their columns) and ordinary values
// (rounded to int8 against the largest of them); then every weight row meets every x row, once in exact integers and
// once over the outliers, in column order.
//
// Must be compiled without contraction (CMakeLists.txt does): the outlier sum then equals the reference bit for bit.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "int8.h"
#include "pool.h"

namespace hb {

namespace {

constexpr int64_t kRowsPerPass = 64;
constexpr int64_t kExactTerms = 65536;  // products of two int8 codes that an int32 surely holds the sum of

// The parts of the workspace, in bytes from its start; each is a multiple of 64.
struct Layout {
    int64_t rows;          // rows per pass
    int64_t columns;       // K rounded up
    int64_t threads;       // parts
    int64_t codes_at;      // int8 [rows, columns]
    int64_t absmax_at;     // float [rows]
    int64_t counts_at;     // int32 [rows]: outliers of each row
    int64_t outliers_at;   // float [rows, columns]: their values
    int64_t positions_at;  // int32 [rows, columns]: their columns
    int64_t loaded_at;     // float [threads, columns]: one row of x
    int64_t mask_at;       // uint8 [columns]: columns that are outliers for the whole batch
    int64_t end;

    explicit Layout(const hb_linear8_args& a)
        : rows(a.M < kRowsPerPass ? a.M : kRowsPerPass),
          columns(round_up(a.K, 64)),
          threads(threads_for(a.call.threads, a.N * (a.K / 8 + 1) * (a.M < 8 ? a.M : 8))),
          codes_at(0),
          absmax_at(codes_at + rows * columns),
          counts_at(absmax_at + round_up(rows * 4, 64)),
          outliers_at(counts_at + round_up(rows * 4, 64)),
          positions_at(outliers_at + rows * columns * 4),
          loaded_at(positions_at + rows * columns * 4),
          mask_at(loaded_at + threads * columns * 4),
          end(mask_at + columns) {}
};

struct Workspace {
    const Layout& layout;
    char* base;

    int8_t* codes(int64_t row) const { return at<int8_t>(layout.codes_at) + row * layout.columns; }
    float* absmax() const { return at<float>(layout.absmax_at); }
    int32_t* counts() const { return at<int32_t>(layout.counts_at); }
    float* outliers(int64_t row) const { return at<float>(layout.outliers_at) + row * layout.columns; }
    int32_t* positions(int64_t row) const { return at<int32_t>(layout.positions_at) + row * layout.columns; }
    float* loaded(int64_t part) const { return at<float>(layout.loaded_at) + part * layout.columns; }
    uint8_t* mask() const { return at<uint8_t>(layout.mask_at); }

  private:
    template <typename T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(base + offset);
    }
};

bool is_outlier(float value, float threshold) {
    return fabsf(value) >= threshold;
}

HB_CLONES int64_t exact_dot(const int8_t* a, const int8_t* b, int64_t count) {
    int64_t total = 0;
    for (int64_t first = 0; first < count; first += kExactTerms) {
        const int64_t last = first + kExactTerms < count ? first + kExactTerms : count;
        int32_t sum = 0;
        for (int64_t k = first; k < last; ++k) sum += static_cast<int16_t>(a[k]) * static_cast<int16_t>(b[k]);
        total += sum;
    }
    return total;
}

HB_CLONES float ordinary_absmax(const float* values, int64_t count) {
    return largest_magnitude(values, count);
}

void mark_columns(const hb_linear8_args& a, const Workspace& space, float threshold) {
    parallel_for(space.layout.threads, a.K, [&](int64_t, int64_t begin, int64_t end) {
        memset(space.mask() + begin, 0, static_cast<size_t>(end - begin));
        for (int64_t row = 0; row < a.M; ++row) {
            for (int64_t k = begin; k < end; ++k) {
                if (is_outlier(load_float(a.x, a.x_dtype, row * a.K + k), threshold)) space.mask()[k] = 1;
            }
        }
    });
}

// Row `row` of x into slot `slot`: outliers out, the rest to int8.
void split_row(const hb_linear8_args& a, const Workspace& space, float threshold, int64_t row, int64_t slot,
               float* values) {
    const bool by_column = a.outlier_rule == HB_OUTLIERS_BATCH;
    load_floats(a.x, a.x_dtype, row * a.K, a.K, values);
    float* const outliers = space.outliers(slot);
    int32_t* const positions = space.positions(slot);
    int32_t found = 0;
    // Ordinary values in an outlier column still count for the row's maximum, as in bitsandbytes: take them out later.
    for (int64_t k = 0; k < a.K; ++k) {
        const bool by_value = is_outlier(values[k], threshold);
        if (by_value || (by_column && space.mask()[k] != 0)) {
            outliers[found] = values[k];
            positions[found++] = static_cast<int32_t>(k);
            if (by_value) values[k] = 0;
        }
    }
    const float absmax = ordinary_absmax(values, a.K);
    for (int32_t i = 0; i < found; ++i) values[positions[i]] = 0;
    round_to_int8(values, a.K, int8_factor(absmax), space.codes(slot));
    space.absmax()[slot] = absmax;
    space.counts()[slot] = found;
}

float one_output(const hb_linear8_args& a, const Workspace& space, int64_t slot, int64_t n, float bias) {
    const int8_t* const weights = a.codes + n * a.K;
    const float exact = static_cast<float>(exact_dot(space.codes(slot), weights, a.K));
    float out = exact * space.absmax()[slot] * a.absmax[n] * kInt8ProductScale;
    const int32_t found = space.counts()[slot];
    if (found > 0) {
        const float* const outliers = space.outliers(slot);
        const int32_t* const positions = space.positions(slot);
        float total = 0;
        for (int32_t i = 0; i < found; ++i) total += outliers[i] * static_cast<float>(weights[positions[i]]);
        out += total * (a.absmax[n] / kInt8Max);
    }
    return out + bias;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_linear8_workspace(const hb_linear8_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_linear8_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = Layout(*args).end;
    return HB_OK;
}

extern "C" hb_status hb_linear8(const hb_linear8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_linear8_args& a = *args;
    if (a.M == 0 || a.N == 0) return HB_OK;
    const Layout layout(a);
    HB_REQUIRE(check_workspace(a.call, layout.end));

    const Workspace space = {layout, static_cast<char*>(a.call.workspace)};
    const float threshold = a.threshold > 0 ? static_cast<float>(a.threshold) : NAN;  // no value compares with NaN
    if (a.outlier_rule == HB_OUTLIERS_BATCH) mark_columns(a, space, threshold);
    for (int64_t first_row = 0; first_row < a.M; first_row += kRowsPerPass) {
        const int64_t rows = a.M - first_row < kRowsPerPass ? a.M - first_row : kRowsPerPass;
        parallel_for(layout.threads, rows, [&](int64_t part, int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot) {
                split_row(a, space, threshold, first_row + slot, slot, space.loaded(part));
            }
        });
        parallel_for(layout.threads, a.N, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                const float bias = a.bias == nullptr ? 0.0f : load_float(a.bias, a.bias_dtype, n);
                for (int64_t slot = 0; slot < rows; ++slot) {
                    const float out = one_output(a, space, slot, n, bias);
                    store_floats(&out, 1, a.out, a.x_dtype, (first_row + slot) * a.N + n);
                }
            }
        });
    }
    return HB_OK;
}
