// Finds the level: what the processor has and the system saves, by the compiler's runtime and, for AMX, by a trial;
// then the environment.
#include "level.h"

#include <stdlib.h>
#include <string.h>

#include "amx.h"
#include "halfbyte.h"

namespace hb {

namespace {

constexpr const char* kLevelNames[kLevelCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

Level vectors_available() {
#ifdef HB_X86
    // __builtin_cpu_supports also asks XCR0 whether the system saves the wide registers.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return kBaseline;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni")) {
        return kAvx2;
    }
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
#else
    return kBaseline;
#endif
}

Level available() {
    static const Level once = vectors_available() == kAvx512Bf16 && try_amx() ? kAmx : vectors_available();
    return once;
}

// A level without tiles does not ask the system for them.
bool is_available(Level wanted) {
    return wanted <= vectors_available() || (wanted == kAmx && available() == kAmx);
}

// Intel's processors have taken four times as long for an instruction of bfloat16 products as for one of float32, which
// multiplies half as many values: what they are slower with is not chosen for them.
Level best() {
    const Level most = available();
#ifdef HB_X86
    if (most == kAvx512Bf16 && __builtin_cpu_is("intel")) return kAvx512;
#endif
    return most;
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
        if (name == nullptr) return best();
        const Level wanted = level_of(name);
        return is_available(wanted) ? wanted : kLevelCount;
    }();
    return once;
}

}  // namespace

Level level() {
    return chosen() == kLevelCount ? kBaseline : chosen();
}

bool has_avx2() {
    return level() >= kAvx2;
}

bool has_avx512() {
    return level() >= kAvx512;
}

bool has_vbmi() {
#ifdef HB_X86
    return level() >= kAvx512Bf16 && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
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
