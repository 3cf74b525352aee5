// Asks for AMX: processor, system, trial, in this order, so that no instruction runs that the one before did not allow.
#include "amx.h"

#include "level.h"

#if defined(HB_X86) && defined(__linux__)

#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <system_error>
#include <thread>

namespace hb {

namespace {

constexpr unsigned kTileData = 18;                   // the tiles themselves among the system's state components
constexpr uint64_t kTileStates = uint64_t{3} << 17;  // and with them their configuration
constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kBfloat16 = 1u << 22;  // leaf 7, edx
constexpr unsigned kOsSaves = 1u << 27;                                // leaf 1, ecx: the system has switched XGETBV on
constexpr long kGetPermissions = 0x1022, kRequestPermission = 0x1023;  // of arch_prctl

bool processor_has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsSaves) == 0) return false;
    constexpr unsigned kAll = kTile | kInt8 | kBfloat16;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    // Palette 1: eight tiles of sixteen rows of 64 bytes.
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    return (b & 0xffff) == kTileRowBytes && b >> 16 >= 8 && (c & 0xffff) >= kTileRows;
}

bool system_saves_tiles() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileStates) == kTileStates;
}

// The system refuses where a thread has too small a stack for signals, an old one does not know the request, and a
// sandbox may answer anything: what counts is whether it says afterwards that it is permitted.
bool system_permits_tiles() {
    syscall(SYS_arch_prctl, kRequestPermission, static_cast<unsigned long>(kTileData));
    uint64_t permitted = 0;
    const long failed = syscall(SYS_arch_prctl, kGetPermissions, &permitted);
    return failed == 0 && (permitted >> kTileData & 1) != 0;
}

bool another_thread_multiplies() {
    bool is_right = false;
    sigset_t every, before;  // the process's signals are not for this thread
    sigfillset(&every);
    pthread_sigmask(SIG_BLOCK, &every, &before);
    try {
        std::thread([&is_right] { is_right = tiles_multiply<AmxTiles>(); }).join();
    } catch (const std::system_error&) {
        is_right = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return is_right;
}

}  // namespace

bool try_amx() {
    return processor_has_tiles() && system_saves_tiles() && system_permits_tiles() && tiles_multiply<AmxTiles>() &&
           another_thread_multiplies();
}

}  // namespace hb

#else

namespace hb {

bool try_amx() {
    return false;
}

}  // namespace hb

#endif
