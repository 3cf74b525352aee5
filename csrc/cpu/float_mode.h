// How a thread rounds and what it makes of subnormal numbers: a register that a thread inherits from the one that made
// it, so a worker may have another mode than the caller it works for.
//
// Not here: which exceptions trap. A caller that wants signals gets them on its own thread alone.
#pragma once

#include <stdint.h>

#include "clones.h"

namespace hb {

#if defined(__x86_64__)
constexpr uint32_t kModeBits = 0xe040;  // of MXCSR: flush to zero, two of rounding, subnormal operands are zeros
HB_INLINE uint32_t float_register() {
    return __builtin_ia32_stmxcsr();
}
HB_INLINE void set_float_register(uint32_t bits) {
    __builtin_ia32_ldmxcsr(bits);
}
#elif defined(__aarch64__)
constexpr uint64_t kModeBits = 0x7c80007;  // of FPCR: AHP, DN, FZ, two of rounding, FZ16; NEP, AH, FIZ
HB_INLINE uint64_t float_register() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
}
HB_INLINE void set_float_register(uint64_t bits) {
    asm volatile("msr fpcr, %0" ::"r"(bits));
}
#else
constexpr uint32_t kModeBits = 0;
HB_INLINE uint32_t float_register() {
    return 0;
}
HB_INLINE void set_float_register(uint32_t) {}
#endif

using FloatMode = decltype(float_register());

HB_INLINE FloatMode float_mode() {
    return float_register() & kModeBits;
}

// This thread computes in a mode, and is left as it was found.
class FloatModeScope {
  public:
    explicit FloatModeScope(FloatMode mode) : before_(float_register()), is_other_((before_ & kModeBits) != mode) {
        if (is_other_) set_float_register((before_ & ~kModeBits) | mode);
    }
    ~FloatModeScope() {
        if (is_other_) set_float_register(before_);
    }
    FloatModeScope(const FloatModeScope&) = delete;
    FloatModeScope& operator=(const FloatModeScope&) = delete;

  private:
    const FloatMode before_;
    const bool is_other_;
};

}  // namespace hb
