// When results are written around the caches.
#pragma once

#include <stdint.h>

namespace hb {

// So large a tensor does not stay in a cache, and a write through one reads first what it overwrites.
inline bool should_stream(int64_t bytes) {
    return bytes >= int64_t{32} << 20;
}

}  // namespace hb
