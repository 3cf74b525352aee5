// Finds the level: cpuid through the compiler's runtime, the system's consent for AMX, then the environment.
#include "level.h"

#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"

#if defined(HB_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hb {

namespace {

constexpr const char* kLevelNames[kLevelCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(HB_X86) && defined(__linux__)
// AMX needs the processor, and tile data among the states that the system saves for this process, which has to ask.
bool has_amx() {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if ((d & (kAmxBf16 | kAmxTile | kAmxInt8)) != (kAmxBf16 | kAmxTile | kAmxInt8)) return false;
    constexpr long kAskPermission = 0x1023, kGetPermission = 0x1022, kTileData = 18;  // arch_prctl(2)
    unsigned long permitted = 0;
    if (syscall(SYS_arch_prctl, kAskPermission, kTileData) != 0) return false;
    if (syscall(SYS_arch_prctl, kGetPermission, &permitted) != 0) return false;
    return (permitted >> kTileData & 1) != 0;
}
#endif

Level available() {
#ifdef HB_X86
    // __builtin_cpu_supports also asks XCR0 whether the system saves the wide registers.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
        return kBaseline;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni")) {
        return kAvx2;
    }
    if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
#ifdef __linux__
    if (has_amx()) return kAmx;
#endif
    return kAvx512Bf16;
#else
    return kBaseline;
#endif
}

// kLevelCount for a name that is none.
Level level_of(const char* name) {
    int found = 0;
    while (found < kLevelCount && strcmp(kLevelNames[found], name) != 0) ++found;
    return static_cast<Level>(found);
}

// The level that runs, or kLevelCount where the environment asks for one that is unknown or not here.
Level chosen() {
    static const Level once = [] {
        const char* const name = getenv("HALFBYTE_CPU_LEVEL");
        const Level most = available();
        if (name == nullptr) return most;
        const Level wanted = level_of(name);
        return wanted <= most ? wanted : kLevelCount;
    }();
    return once;
}

}  // namespace

Level level() {
    return chosen() == kLevelCount ? kBaseline : chosen();
}

}  // namespace hb

extern "C" const char* hb_level(void) {
    return hb::chosen() == hb::kLevelCount ? nullptr : hb::kLevelNames[hb::chosen()];
}

extern "C" int64_t hb_levels(const char** names, int64_t room) {
    const int64_t count = hb::available() + 1;
    if (names == nullptr || room < count) return -1;
    for (int64_t i = 0; i < count; ++i) names[i] = hb::kLevelNames[i];
    return count;
}
