// New keys and values into a paged cache, row by row: copies, whatever the dtype. A slot is believed only where it lies
// in the cache. Rows that share a slot are written in their order where one thread works, which few rows never leave.
#include <string.h>

#include "checks.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

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

void write_row(const hb_cache_write_args& a, int64_t t) {
    const int64_t slot = a.slots[t], bytes = dtype_bytes(a.dtype);
    if (slot < 0 || slot >= a.slot_count || a.G == 0) return;
    const auto one = [&](const void* rows, int64_t row_stride, int64_t head_stride, int64_t size, void* store) {
        if (size == 0) return;
        const char* const from = static_cast<const char*>(rows) + t * row_stride * bytes;
        char* const to = static_cast<char*>(store) + slot * a.G * size * bytes;
        copy_row(from, head_stride * bytes, a.G, size * bytes, to);
    };
    one(a.key, a.key_row_stride, a.key_head_stride, a.D, a.keys);
    one(a.value, a.value_row_stride, a.value_head_stride, a.E, a.values);
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_cache_write(const hb_cache_write_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_cache_write_args& a = *args;
    parallel_for(threads_for(a.call.threads, a.T * a.G * (a.D + a.E)), a.T, [&a](int64_t, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) write_row(a, t);
    });
    return HB_OK;
}
