#include "fibre.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace hb {
namespace emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved, not used: pages come when they are touched
Fibre* running = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void before_switch(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void after_switch(void* fake_stack, const void** old_stack, size_t* old_bytes) {
    __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
}
void forget_frames(char* stack) {
    __asan_unpoison_memory_region(stack, kStackBytes);
}
#else
void before_switch(void**, const void*, size_t) {}
void after_switch(void*, const void**, size_t*) {}
void forget_frames(char*) {}
#endif

}  // namespace

#if defined(__x86_64__)
// What a function has to keep goes onto the old stack and comes from the new one.
extern "C" void hb_emulation_switch(void** old_stack, void* new_stack);
asm(R"(
.text
.type hb_emulation_switch, @function
hb_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hb_emulation_switch, .-hb_emulation_switch
)");
#endif

Fibre::Fibre() {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "emulation: no memory for a fibre's stack of %zu bytes\n", kStackBytes);
        abort();
    }
    stack_ = static_cast<char*>(memory);
}

Fibre::~Fibre() {
    forget_frames(stack_);
    munmap(stack_, kStackBytes);
}

void Fibre::enter() {
    Fibre* const self = running;
    after_switch(nullptr, &self->outside_stack_, &self->outside_bytes_);
    self->body_();
    abort();  // a body leaves
}

void Fibre::begin(void (*body)()) {
    forget_frames(stack_);
    body_ = body;
#if defined(__x86_64__)
    // As if hb_emulation_switch had been called from a function that enter() returns to: six registers and an address,
    // placed so that enter() finds the stack as after a call.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&Fibre::enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    makecontext(&own_, &Fibre::enter, 0);
#endif
}

void Fibre::resume() {
    void* fake_stack = nullptr;
    running = this;
    before_switch(&fake_stack, stack_, kStackBytes);
#if defined(__x86_64__)
    hb_emulation_switch(&outside_, own_);
#else
    swapcontext(&outside_, &own_);
#endif
    after_switch(fake_stack, nullptr, nullptr);
}

void Fibre::leave() {
    void* fake_stack = nullptr;
    before_switch(&fake_stack, outside_stack_, outside_bytes_);
#if defined(__x86_64__)
    hb_emulation_switch(&own_, outside_);
#else
    swapcontext(&own_, &outside_);
#endif
    after_switch(fake_stack, &outside_stack_, &outside_bytes_);
}

}  // namespace emulation
}  // namespace hb
