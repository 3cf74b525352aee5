// Which hand-written instruction set variants may run: what the CPU has, unless the environment says less.
//
// HALFBYTE_CPU_LEVEL=baseline leaves them out; the results are the same to the bit, which the tests check both ways.
// Not here: HB_CLONES, where the compiler writes the variants and the loader chooses.
#pragma once

#include <stdlib.h>
#include <string.h>

namespace hb {

#if defined(__x86_64__) && defined(__GNUC__)
#define HB_X86    1
#define HB_AVX512 __attribute__((target("avx512f")))

// Read once: a process does not change its mind between two layers.
inline bool has_avx512() {
    static const bool has = [] {
        const char* level = getenv("HALFBYTE_CPU_LEVEL");
        return (level == nullptr || strcmp(level, "baseline") != 0) && __builtin_cpu_supports("avx512f");
    }();
    return has;
}
#endif

}  // namespace hb
