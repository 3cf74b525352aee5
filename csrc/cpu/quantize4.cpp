// Values -> 4-bit codes, block by block: the largest magnitude, then each value's rank among the thresholds.
//
// The codes are those of the decision trees in bitsandbytes' CUDA kernels (strict >), computed as counts so that the
// loops vectorise. A block of zeros gets the code of zero; NaN fails every comparison and gets rank 0.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {

namespace {

HB_INLINE void rank_nf4(const float* values, int64_t count, float scale, float reciprocal, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        const float normalised = values[i] * scale * reciprocal;
        int32_t rank = 0;
        for (int t = 0; t < kNf4Thresholds.length; ++t) rank += normalised > kNf4Thresholds.at[t] ? 1 : 0;
        codes[i] = static_cast<uint8_t>(rank);
    }
}

HB_INLINE void rank_fp4(const float* values, int64_t count, float scale, float reciprocal, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        const float normalised = values[i] * scale * reciprocal;
        const float magnitude = normalised < 0 ? -normalised : normalised;
        int32_t rank = normalised < 0 ? 8 : 0;
        for (int t = 0; t < kFp4Thresholds.length; ++t) rank += magnitude > kFp4Thresholds.at[t] ? 1 : 0;
        codes[i] = static_cast<uint8_t>(rank);
    }
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = static_cast<uint8_t>(kFp4CodeOfRank.at[codes[i] & 7] | (codes[i] & 8));
    }
}

// One block of at most kLargestBlocksize values; packed points to its first byte. Returns its absmax.
HB_CLONES float quantize_block(int64_t format, const float* values, int64_t count, uint8_t* packed) {
    const float absmax = largest_magnitude(values, count);
    const float scale = absmax < kSmallestDivisor ? kSubnormalScale : 1.0f;
    const float divisor = absmax * scale;
    const float reciprocal = divisor == 0 ? 0.0f : 1.0f / divisor;
    uint8_t codes[kLargestBlocksize + 1];
    if (format == HB_NF4) {
        rank_nf4(values, count, scale, reciprocal, codes);
        codes[count] = kNf4Zero;
    } else {
        rank_fp4(values, count, scale, reciprocal, codes);
        codes[count] = kFp4Zero;
    }
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
        packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
    return absmax;
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize4(const hb_quantize4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize4_args& a = *args;
    const int64_t threads = threads_for(a.call.threads, a.n);
    parallel_for(threads, ceil_div(a.n, a.blocksize), [&a](int64_t, int64_t begin, int64_t end) {
        float values[kLargestBlocksize];
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * a.blocksize;
            const int64_t count = first + a.blocksize <= a.n ? a.blocksize : a.n - first;
            load_floats(a.x, a.x_dtype, first, count, values);
            a.absmax[block] = quantize_block(a.format, values, count, a.packed + first / 2);
        }
    });
    return HB_OK;
}
