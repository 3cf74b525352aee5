// Fibres: functions with a stack of their own that stop and go on when they are told to. AddressSanitizer is told too.
//
// Not here: who runs when (emulator.cpp). A fibre that is dropped before its end is not unwound.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace hb {
namespace emulation {

class Fibre {
  public:
    Fibre();
    ~Fibre();
    Fibre(const Fibre&) = delete;
    Fibre& operator=(const Fibre&) = delete;

    // Makes it ready to run `body` from its beginning. The body must end with leave(), and never return.
    void begin(void (*body)());
    // From outside: runs it until it calls leave().
    void resume();
    // From inside: back to where resume() was called.
    void leave();

  private:
    static void enter();

    void (*body_)() = nullptr;
    char* stack_;
#if defined(__x86_64__)
    void* own_ = nullptr;  // the stack pointers of whoever does not run
    void* outside_ = nullptr;
#else
    ucontext_t own_;
    ucontext_t outside_;
#endif
    const void* outside_stack_ = nullptr;  // for AddressSanitizer
    size_t outside_bytes_ = 0;
};

}  // namespace emulation
}  // namespace hb
