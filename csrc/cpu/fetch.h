// Fetching weights ahead of their use, each line once and in the order of memory. Where memory decides, in two steps:
// from memory into the second cache, and from there into the first; elsewhere the processor does the second by itself.
// A core's first cache waits for two dozen lines at most, which at this memory's delay is less than half of what a core
// can read; its second cache waits for twice as many.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "decode4.h"

namespace hb {

constexpr int64_t kFetchBytes = 12288;  // ahead, in whole rows worked on together: where fetching begins
constexpr int64_t kFetchNear = 2048;    // what is still ahead when a line goes on to the first cache

// How far ahead of the first of `rows` rows, one behind the other, a walk over them begins to fetch.
HB_INLINE int64_t fetch_distance(int64_t rows, int64_t row_bytes) {
    return (kFetchBytes / (rows * row_bytes) + 1) * rows * row_bytes;
}

// The line at `far`, which may lie beyond the weight: fetching there does nothing.
HB_INLINE void fetch_line(const void* far) {
    __builtin_prefetch(far, 0, 2);
    __builtin_prefetch(static_cast<const char*>(far) - (kFetchBytes - kFetchNear), 0, 3);
}

// `bytes` that are needed much later, into the second cache; a line more than that, since shares seldom are whole
// lines. Returns what is next.
HB_INLINE const uint8_t* fetch_share(const uint8_t* from, int64_t bytes) {
    if (bytes == 0) return from;  // of a weight without columns, which may be null
    for (const uint8_t* const end = from + bytes + 64; from < end; from += 64) __builtin_prefetch(from, 0, 2);
    return from;
}

// The absmax of blocks [first, first + count), whether they are there or not, into the second cache. Rows' own lie too
// near each other for the processor to see a pattern.
HB_INLINE void fetch_absmax(const AbsmaxSource& source, int64_t first, int64_t count) {
    const int64_t width = source.nested_absmax == nullptr ? static_cast<int64_t>(sizeof(float)) : 1;
    const char* const from = static_cast<const char*>(source.absmax) + first * width;
    for (int64_t i = 0; i < count * width; i += 64) __builtin_prefetch(from + i, 0, 2);
}

}  // namespace hb
