// Double quantization: block maxima <-> 8-bit codes of the dynamic map.
//
// Must be compiled without contraction (CMakeLists.txt does): map[code] * nested_absmax + offset is rounded twice.
#include "absmax.h"

#include <algorithm>

#include "checks.h"
#include "clones.h"
#include "decode4.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "level.h"
#include "pool.h"

namespace hb {

namespace {

// Inside one second-level block.
HB_CLONES(void, decode_absmax, (const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = kDynamicValues.at[codes[i]];
    for (int64_t i = 0; i < count; ++i) {
        const float scaled = out[i] * nested_absmax;
        out[i] = scaled + offset;
    }
}

using Decode = void (*)(const uint8_t* codes, int64_t count, float nested_absmax, float offset, float* out);

Decode best_decode() {
#ifdef HB_X86
    if (has_vbmi()) return decode_absmax_vbmi;
    if (has_avx512()) return decode_absmax_avx512;
#endif
    return decode_absmax;
}

}  // namespace

void load_absmax(const AbsmaxSource& source, int64_t first, int64_t count, float* out) {
    if (source.nested_absmax == nullptr) {
        std::copy_n(static_cast<const float*>(source.absmax) + first, count, out);
        return;
    }
    static const auto decode = best_decode();
    const uint8_t* const codes = static_cast<const uint8_t*>(source.absmax);
    const int64_t end = first + count;
    int64_t block = first / source.nested_blocksize;
    while (first < end) {
        const int64_t block_end = std::min((block + 1) * source.nested_blocksize, end);
        decode(codes + first, block_end - first, source.nested_absmax[block], *source.offset, out);
        out += block_end - first;
        first = block_end;
        ++block;
    }
}

const float* absmax_at(const AbsmaxSource& source, int64_t first, int64_t count, float* room) {
    if (source.nested_absmax == nullptr) return static_cast<const float*>(source.absmax) + first;
    load_absmax(source, first, count, room);
    return room;
}

namespace {

// The code of a value is the number of midpoints below it. Floats are cut into buckets of 1/64 of an octave, by sign,
// exponent and the fraction's first bits; no bucket holds more than one midpoint (the table's maker checks it), so that
// a lookup and one comparison give the code.
constexpr int kBucketBits = 6;
constexpr int kBucketShift = 23 - kBucketBits;
constexpr int kLowestOctave = 105;  // 2^-22: below the smallest midpoint
constexpr int kOctaves = 128 - kLowestOctave;
constexpr int kBuckets = kOctaves << kBucketBits;
constexpr int kBucketOfNan = 2 * kBuckets;  // after those of positive and of negative values
constexpr uint32_t kLowestBits = static_cast<uint32_t>(kLowestOctave) << 23;
constexpr uint32_t kInfinityBits = 0x7f800000u;

constexpr double power_of_two(int exponent) {
    double power = 1.0;
    for (; exponent > 0; --exponent) power *= 2.0;
    for (; exponent < 0; ++exponent) power *= 0.5;
    return power;
}

constexpr double bucket_start(int bucket) {
    const int fraction = bucket % (1 << kBucketBits);
    return (1.0 + fraction / static_cast<double>(1 << kBucketBits)) *
           power_of_two(kLowestOctave + (bucket >> kBucketBits) - 127);
}

struct CodeTable {
    uint8_t first[kBucketOfNan + 1];  // the number of midpoints below everything in the bucket
    float midpoint[256];              // the next one, for each of those numbers
    bool is_valid;  // at most one midpoint in any bucket, and none nearer to zero than the first bucket
};

constexpr CodeTable make_code_table() {
    CodeTable table{};
    table.is_valid = true;
    for (int i = 0; i < kDynamicMidpoints.length; ++i) table.midpoint[i] = kDynamicMidpoints.at[i];
    table.midpoint[255] = 2.0f;       // beyond every normalised value
    table.first[kBucketOfNan] = 255;  // which has every midpoint below it
    int below = 127;  // midpoints under the bucket; the 127 negative ones are under every positive value
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
        const double start = bucket_start(bucket), end = bucket_start(bucket + 1);
        while (below < 255 && kDynamicMidpoints.at[below] < start) ++below;
        table.first[bucket] = static_cast<uint8_t>(below);
        if (below < 254 && kDynamicMidpoints.at[below + 1] < end) table.is_valid = false;
        if (bucket == 0 && below != 127) table.is_valid = false;
    }
    int above = 127;  // midpoints under the bucket (-end, -start]
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
        const double start = bucket_start(bucket), end = bucket_start(bucket + 1);
        const int before = above;
        while (above > 0 && kDynamicMidpoints.at[above - 1] > -end) --above;
        table.first[kBuckets + bucket] = static_cast<uint8_t>(above);
        if (before - above > 1 || (bucket == 0 && above != 127)) table.is_valid = false;
        if (before - above == 1 && kDynamicMidpoints.at[above] > -start) table.is_valid = false;
    }
    return table;
}

constexpr CodeTable kCodes = make_code_table();
static_assert(kCodes.is_valid, "two midpoints of the dynamic map share a bucket");

// `value` is normalised, at most a rounding beyond 1, or NaN.
HB_INLINE uint16_t bucket_of(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t lifted = magnitude < kLowestBits ? kLowestBits : magnitude;
    const uint32_t bucket = (lifted - kLowestBits) >> kBucketShift;
    const uint32_t bounded = bucket < kBuckets ? bucket : kBuckets - 1;
    const uint32_t of_sign = bounded + (bits >> 31) * kBuckets;
    return static_cast<uint16_t>(magnitude > kInfinityBits ? kBucketOfNan : of_sign);
}

HB_CLONES(float, largest_distance, (const float* absmax, int64_t count, float offset)) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(absmax[i] - offset) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(static_cast<uint32_t>(largest));
}

HB_CLONES(void, find_buckets,
          (const float* absmax, int64_t count, float offset, const Normaliser& normalise, float* normalised,
           uint16_t* buckets)) {
    for (int64_t i = 0; i < count; ++i) {
        normalised[i] = normalise(absmax[i] - offset);
        buckets[i] = bucket_of(normalised[i]);
    }
}

void write_codes(const float* absmax, int64_t count, float offset, float largest, uint8_t* codes) {
    constexpr int64_t kPiece = 256;
    const Normaliser normalise(largest);
    float normalised[kPiece];
    uint16_t buckets[kPiece];
    for (int64_t first = 0; first < count; first += kPiece) {
        const int64_t length = std::min(kPiece, count - first);
        find_buckets(absmax + first, length, offset, normalise, normalised, buckets);
        for (int64_t i = 0; i < length; ++i) {
            const uint8_t below = kCodes.first[buckets[i]];
            codes[first + i] = static_cast<uint8_t>(below + (normalised[i] > kCodes.midpoint[below] ? 1 : 0));
        }
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize_absmax(const hb_quantize_absmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize_absmax_args& a = *args;
    const int64_t threads = threads_for(a.call.threads, a.blocks * 4);  // a lookup and two passes per value
    parallel_for(threads, ceil_div(a.blocks, a.nested_blocksize), [&a](int64_t, int64_t begin, int64_t end) {
        const float offset = *a.offset;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * a.nested_blocksize;
            const int64_t count = std::min(a.nested_blocksize, a.blocks - first);
            const float largest = largest_distance(a.absmax + first, count, offset);
            write_codes(a.absmax + first, count, offset, largest, a.codes + first);
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
