// Double quantization: block maxima <-> 8-bit codes of the dynamic map.
//
// Must be compiled without contraction (CMakeLists.txt does): map[code] * nested_absmax + offset is rounded twice.
#include <algorithm>

#include "checks.h"
#include "decode4.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {

void load_absmax(const AbsmaxSource& source, int64_t first, int64_t count, float* out) {
    if (source.nested_absmax == nullptr) {
        std::copy_n(static_cast<const float*>(source.absmax) + first, count, out);
        return;
    }
    const uint8_t* const codes = static_cast<const uint8_t*>(source.absmax);
    const float offset = *source.offset;
    for (int64_t i = 0; i < count; ++i) {
        const float scaled =
            kDynamicValues.at[codes[first + i]] * source.nested_absmax[(first + i) / source.nested_blocksize];
        out[i] = scaled + offset;
    }
}

namespace {

// The number of midpoints below the value; all of them for a NaN.
uint8_t nearest_code(float value) {
    const float* const begin = kDynamicMidpoints.at;
    const float* const found =
        std::partition_point(begin, begin + kDynamicMidpoints.length, [value](float m) { return !(m >= value); });
    return static_cast<uint8_t>(found - begin);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize_absmax(const hb_quantize_absmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize_absmax_args& a = *args;
    const int64_t threads = threads_for(a.call.threads, a.blocks * 8);  // a search, not one comparison, per value
    parallel_for(threads, ceil_div(a.blocks, a.nested_blocksize), [&a](int64_t, int64_t begin, int64_t end) {
        const float offset = *a.offset;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * a.nested_blocksize;
            const int64_t last = std::min(first + a.nested_blocksize, a.blocks);
            float largest = 0;
            for (int64_t i = first; i < last; ++i) {
                const float centred = a.absmax[i] - offset;
                const float both[2] = {largest, centred};
                largest = largest_magnitude(both, 2);
            }
            const float scale = largest < kSmallestDivisor ? kSubnormalScale : 1.0f;
            const float divisor = largest * scale;
            const float reciprocal = divisor == 0 ? 0.0f : 1.0f / divisor;
            for (int64_t i = first; i < last; ++i) {
                a.codes[i] = nearest_code((a.absmax[i] - offset) * scale * reciprocal);
            }
            a.nested_absmax[block] = largest;
        }
    });
    return HB_OK;
}

extern "C" hb_status hb_dequantize_absmax(const hb_dequantize_absmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize_absmax_args& a = *args;
    const AbsmaxSource source = {a.codes, a.nested_absmax, a.offset, a.nested_blocksize};
    parallel_for(threads_for(a.call.threads, a.blocks), a.blocks, [&a, &source](int64_t, int64_t begin, int64_t end) {
        load_absmax(source, begin, end - begin, a.absmax + begin);
    });
    return HB_OK;
}
