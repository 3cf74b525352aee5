// Conversions of runs of values; the arithmetic is in floats.h.
#include "floats.h"

namespace hb {

namespace {

HB_CLONES(void, halves_to_floats, (const uint16_t* in, int64_t count, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_half(in[i]);
}

HB_CLONES(void, bfloats_to_floats, (const uint16_t* in, int64_t count, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat(in[i]);
}

HB_CLONES(void, floats_to_halves, (const float* in, int64_t count, uint16_t* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_half(in[i]);
}

HB_CLONES(void, floats_to_bfloats, (const float* in, int64_t count, uint16_t* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat(in[i]);
}

HB_CLONES(void, codes_to_floats, (const int8_t* in, int64_t count, float* out)) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

}  // namespace

void load_floats(const void* tensor, int64_t dtype, int64_t first, int64_t count, float* out) {
    if (count == 0) return;
    if (dtype == HB_FLOAT32) {
        memcpy(out, static_cast<const float*>(tensor) + first, static_cast<size_t>(count) * sizeof(float));
    } else if (dtype == HB_FLOAT16) {
        halves_to_floats(static_cast<const uint16_t*>(tensor) + first, count, out);
    } else if (dtype == HB_INT8) {
        codes_to_floats(static_cast<const int8_t*>(tensor) + first, count, out);
    } else {
        bfloats_to_floats(static_cast<const uint16_t*>(tensor) + first, count, out);
    }
}

void store_floats(const float* values, int64_t count, void* tensor, int64_t dtype, int64_t first) {
    if (count == 0) return;
    if (dtype == HB_FLOAT32) {
        memcpy(static_cast<float*>(tensor) + first, values, static_cast<size_t>(count) * sizeof(float));
    } else if (dtype == HB_FLOAT16) {
        floats_to_halves(values, count, static_cast<uint16_t*>(tensor) + first);
    } else {
        floats_to_bfloats(values, count, static_cast<uint16_t*>(tensor) + first);
    }
}

}  // namespace hb
