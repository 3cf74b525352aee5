// Root mean square normalisation, row by row. The squares go to 16 float32 sums by column modulo 16, which are then
// added in halves, so that a row has the same bits at every instruction set and with any number of threads.
#include <math.h>

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values converted at a time; a multiple of kSums
constexpr int64_t kSums = 16;

HB_CLONES(void, add_squares, (const float* values, int64_t count, float* sums)) {
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int64_t j = 0; j < kSums; ++j) sums[j] += values[i + j] * values[i + j];
    }
    for (int64_t j = 0; i + j < count; ++j) sums[j] += values[i + j] * values[i + j];
}

HB_CLONES(void, multiply, (float* values, float factor, int64_t count)) {
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

float sum_of_squares(const hb_rms_norm_args& a, int64_t row, float* values) {
    float sums[kSums] = {};
    for (int64_t k = 0; k < a.K; k += kPiece) {
        const int64_t count = a.K - k < kPiece ? a.K - k : kPiece;
        load_floats(a.x, a.dtype, row * a.K + k, count, values);
        add_squares(values, count, sums);
    }
    for (int64_t width = kSums / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

void normalise(const hb_rms_norm_args& a, int64_t row) {
    float values[kPiece];
    const float mean = sum_of_squares(a, row, values) / static_cast<float>(a.K);
    const float factor = 1.0f / sqrtf(mean + static_cast<float>(a.eps));
    for (int64_t k = 0; k < a.K; k += kPiece) {
        const int64_t count = a.K - k < kPiece ? a.K - k : kPiece, at = row * a.K + k;
        load_floats(a.x, a.dtype, at, count, values);
        multiply(values, factor, count);
        store_products(values, count, a.dtype, a.weight, k, a.out, at);
    }
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_rms_norm(const hb_rms_norm_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_rms_norm_args& a = *args;
    if (a.K == 0) return HB_OK;
    parallel_for(threads_for(a.call.threads, a.M * a.K), a.M, [&a](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) normalise(a, row);
    });
    return HB_OK;
}
