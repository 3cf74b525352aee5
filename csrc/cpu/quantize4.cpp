// Values -> 4-bit codes, block by block: the largest magnitude, then each value's rank among the thresholds.
//
// The codes are those of the decision trees in bitsandbytes' CUDA kernels (strict >), computed as counts so that the
// loops vectorise. A block of zeros gets the code of zero; NaN fails every comparison and gets rank 0.
#include "quantize4.h"

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {

namespace {

HB_INLINE void rank_nf4(const float* values, int64_t count, const Normaliser& normalise, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        const float normalised = normalise(values[i]);
        int32_t rank = 0;
        for (int t = 0; t < kNf4Thresholds.length; ++t) rank += normalised > kNf4Thresholds.at[t] ? 1 : 0;
        codes[i] = static_cast<uint8_t>(rank);
    }
}

HB_INLINE void rank_fp4(const float* values, int64_t count, const Normaliser& normalise, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        const float normalised = normalise(values[i]);
        const float magnitude = normalised < 0 ? -normalised : normalised;
        int32_t rank = normalised < 0 ? 8 : 0;
        for (int t = 0; t < kFp4Thresholds.length; ++t) rank += magnitude > kFp4Thresholds.at[t] ? 1 : 0;
        codes[i] = static_cast<uint8_t>(rank);
    }
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = static_cast<uint8_t>(kFp4CodeOfRank.at[codes[i] & 7] | (codes[i] & 8));
    }
}

// One block of at most kLargestBlocksize values, at *scale or at its largest magnitude; packed points to its first
// byte. Returns the scale.
HB_CLONES(float, encode_block,
          (int64_t format, const float* values, int64_t count, const float* given, uint8_t* packed)) {
    const float scale = given != nullptr ? *given : largest_magnitude(values, count);
    const Normaliser normalise(scale);
    uint8_t codes[kLargestBlocksize + 1];
    if (format == HB_NF4) {
        rank_nf4(values, count, normalise, codes);
        codes[count] = kNf4Zero;
    } else {
        rank_fp4(values, count, normalise, codes);
        codes[count] = kFp4Zero;
    }
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
        packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
    return scale;
}

}  // namespace

void encode_blocks(const Blocks4& b, int64_t begin, int64_t end, const float* scales, float* absmax) {
    float values[kLargestBlocksize];
    for (int64_t block = begin; (block = encode_blocks_avx512(b, block, end, scales, absmax)) < end; ++block) {
        const int64_t first = block * b.blocksize;
        const int64_t count = first + b.blocksize <= b.n ? b.blocksize : b.n - first;
        load_floats(b.x, b.x_dtype, first, count, values);
        const float* const given = scales == nullptr ? nullptr : scales + block;
        const float scale = encode_block(b.format, values, count, given, b.packed + first / 2);
        if (given == nullptr) absmax[block] = scale;
    }
}

}  // namespace hb

extern "C" hb_status hb_quantize4(const hb_quantize4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize4_args& a = *args;
    const Blocks4 blocks = {a.x, a.x_dtype, a.n, a.format, a.blocksize, a.packed};
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, a.blocksize),
                 [&](int64_t, int64_t begin, int64_t end) { encode_blocks(blocks, begin, end, nullptr, a.absmax); });
    return HB_OK;
}
