// New keys and values into a paged cache, row by row: copies where the cache has their dtype, else rounded, in int8
// with a scale for each head. A slot is believed only where it lies in the cache.
#include <math.h>
#include <string.h>

#include "checks.h"
#include "floats.h"
#include "halfbyte.h"
#include "int8.h"
#include "pool.h"

namespace hb {
namespace {

// One side of the call: rows as they come, and where they go.
struct Side {
    const void* rows;
    int64_t row_stride, head_stride, size;
    void* store;
    float* scales;  // of the first slot and head; two lie between those of neighbours
};

// One row [heads, size] with its heads `stride` bytes apart -> contiguous.
void copy_row(const char* from, int64_t stride, int64_t heads, int64_t size, char* to) {
    if (stride == size) {
        memcpy(to, from, static_cast<size_t>(heads * size));
        return;
    }
    for (int64_t head = 0; head < heads; ++head) {
        memcpy(to + head * size, from + head * stride, static_cast<size_t>(size));
    }
}

HB_CLONES(float, head_absmax, (const float* values, int64_t count)) {
    return largest_magnitude(values, count);
}

// One head's values -> codes; returns their scale.
float quantize_head(const float* values, int64_t count, int8_t* codes) {
    const float absmax = head_absmax(values, count);
    const bool is_kept = isfinite(absmax) && absmax >= kSmallestStored;
    round_to_int8(values, count, is_kept ? int8_factor(absmax) : 0.0f, codes);
    if (is_kept) return absmax / kInt8Max;
    return isfinite(absmax) ? 0.0f : NAN;
}

void convert_head(const hb_cache_write_args& a, const Side& side, int64_t from, int64_t place) {
    float values[HB_MAX_HEAD_DIM];
    load_floats(side.rows, a.dtype, from, side.size, values);
    if (a.store_dtype == HB_INT8) {
        int8_t* const codes = static_cast<int8_t*>(side.store) + place * side.size;
        side.scales[place * 2] = quantize_head(values, side.size, codes);
    } else {
        store_floats(values, side.size, side.store, a.store_dtype, place * side.size);
    }
}

void write_row(const hb_cache_write_args& a, const Side& side, int64_t t, int64_t slot) {
    if (side.size == 0) return;
    const int64_t bytes = dtype_bytes(a.dtype);
    if (a.store_dtype == a.dtype) {
        const char* const from = static_cast<const char*>(side.rows) + t * side.row_stride * bytes;
        char* const to = static_cast<char*>(side.store) + slot * a.G * side.size * bytes;
        return copy_row(from, side.head_stride * bytes, a.G, side.size * bytes, to);
    }
    for (int64_t head = 0; head < a.G; ++head) {
        convert_head(a, side, t * side.row_stride + head * side.head_stride, slot * a.G + head);
    }
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_cache_write(const hb_cache_write_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_cache_write_args& a = *args;
    if (!has_slots(a)) return HB_OK;
    float* const scales = a.store_dtype == HB_INT8 ? a.scales : nullptr;
    const Side key = {a.key, a.key_row_stride, a.key_head_stride, a.D, a.keys, scales};
    const Side value = {a.value, a.value_row_stride, a.value_head_stride,
                        a.E,     a.values,           scales == nullptr ? nullptr : scales + 1};
    parallel_for(threads_for(a.call.threads, a.T * a.G * (a.D + a.E)), a.T, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const int64_t slot = a.slots[t];
            if (slot < 0 || slot >= a.slot_count) continue;
            write_row(a, key, t, slot);
            write_row(a, value, t, slot);
        }
    });
    return HB_OK;
}
