// Rowwise int8: weights -> codes and row maxima, and back.
#include "int8.h"

#include "checks.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"
#include "stream.h"

namespace hb {

namespace {

// A value as float16 would hold it; one that float16 would make infinite stays as it is.
HB_INLINE float through_half(float value) {
    const uint16_t half = to_half(value);
    return (half & 0x7c00) == 0x7c00 ? value : from_half(half);
}

HB_CLONES(void, round_through_half, (const float* in, int64_t count, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = through_half(in[i]);
}

HB_CLONES(float, row_absmax, (const float* values, int64_t count)) {
    return largest_magnitude(values, count);
}

HB_CLONES(void, scale_codes, (const int8_t* codes, int64_t count, float absmax, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * absmax / kInt8Max;
}

// Rows are worked on in pieces that fit the stack; the maximum of pieces is the maximum of the row.
constexpr int64_t kPiece = 4096;

HB_CLONES(void, round_all, (const float* values, int64_t count, float factor, int8_t* codes)) {
    for (int64_t i = 0; i < count; ++i) codes[i] = nearest_int8(values[i] * factor);
}

}  // namespace

void round_to_int8(const float* values, int64_t count, float factor, int8_t* codes) {
    round_all(values, count, factor, codes);
}

}  // namespace hb

extern "C" hb_status hb_quantize8(const hb_quantize8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize8_args& a = *args;
    parallel_for(threads_for(a.call.threads, a.N * a.K), a.N, [&a](int64_t, int64_t begin, int64_t end) {
        float loaded[kPiece], values[kPiece];
        for (int64_t row = begin; row < end; ++row) {
            const char* const w = static_cast<const char*>(a.w) + row * a.K * dtype_bytes(a.w_dtype);
            int8_t* const codes = a.codes + row * a.K;
            float largest = 0;
            for (int64_t k = largest_avx512(w, a.w_dtype, a.K, &largest); k < a.K; k += kPiece) {
                const int64_t count = a.K - k < kPiece ? a.K - k : kPiece;
                load_floats(w, a.w_dtype, k, count, loaded);
                const float both[2] = {largest, row_absmax(loaded, count)};
                largest = largest_magnitude(both, 2);
            }
            const float absmax = through_half(largest);  // rounding keeps the order, so that it can come last
            const float factor = int8_factor(absmax);
            for (int64_t k = quantize_avx512(w, a.w_dtype, a.K, absmax, codes); k < a.K; k += kPiece) {
                const int64_t count = a.K - k < kPiece ? a.K - k : kPiece;
                load_floats(w, a.w_dtype, k, count, loaded);
                round_through_half(loaded, count, values);
                round_to_int8(values, count, factor, codes + k);
            }
            a.absmax[row] = absmax;
        }
    });
    return HB_OK;
}

extern "C" hb_status hb_dequantize8(const hb_dequantize8_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize8_args& a = *args;
    const int64_t row_bytes = a.K * dtype_bytes(a.out_dtype);
    const bool streams = should_stream(a.N * row_bytes);
    parallel_for(threads_for(a.call.threads, a.N * a.K), a.N, [&](int64_t, int64_t begin, int64_t end) {
        float values[kPiece];
        for (int64_t row = begin; row < end; ++row) {
            const int8_t* const codes = a.codes + row * a.K;
            char* const out = static_cast<char*>(a.out) + row * row_bytes;
            const float absmax = a.absmax[row];
            for (int64_t k = dequantize_avx512(codes, a.K, absmax, out, a.out_dtype, streams); k < a.K; k += kPiece) {
                const int64_t count = a.K - k < kPiece ? a.K - k : kPiece;
                scale_codes(codes + k, count, absmax, values);
                store_floats(values, count, out, a.out_dtype, k);
            }
        }
    });
    return HB_OK;
}
