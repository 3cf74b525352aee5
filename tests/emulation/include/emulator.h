// A small model of how a GPU runs a kernel, for the headers beside this one. It models order, not time.
//
// clang-format off
//     grid        runs as late as it may; its blocks one after the other, in a random order
//     block       its threads are fibres. One runs until it waits; who runs next is random, and now and then one warp is
//                 preferred for a while, so that warps drift apart as far as barriers allow; in every second block one
//                 warp is held back, and runs where nobody else can and nothing else is to come
//     warp        lanes wait for each other where they exchange values (shuffles, votes, tensor cores), nowhere else
//     shared      exactly the bytes asked for, each 0xff when a block begins
//     copies      land at the wait of the thread that started them, at the latest possible time; a few of them land at
//                 once, the earliest, so that what may still be read must not be copied over
//     stream      that of the call, or the launch fails
// clang-format on
//
// What a kernel must not do ends the launch with a sentence on stderr: threads that wait for ever, lanes that meet in
// different functions, misaligned copies, more shared memory than the smallest supported device has. Not modelled:
// memory that is seen late by other threads without a barrier, banks, work on other streams, more than one grid
// dimension. The host's side of the runtime that csrc/cuda may call is all in cuda_runtime.h: nothing there allocates
// or waits.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>
#include <memory>

namespace hb {
namespace emulation {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMostThreads = 1024;
constexpr int64_t kMostSharedBytes = 99 << 10;  // of sm_86, 89 and 120

// The device at hand; hb_emulation_device says which, and may say that there is none.
constexpr int kNoDevice = -1;
constexpr int kHopperDevice = 0;  // of capability 9.0, as no other is
int device();

struct Dimension {
    unsigned x;
};
extern Dimension threadIdx, blockIdx, blockDim, gridDim;

inline int lane() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}

// Runs `thread` once for each thread of the grid. One launch at a time; others wait. hb_emulation_stream names the
// stream that all of them must be on. A Hopper grid may have more shared memory, and the launch in front of it may run
// after it has begun.
enum Grid { kAnyGrid, kHopperGrid };
constexpr int64_t kMostHopperSharedBytes = 227 << 10;
void run_grid(unsigned blocks, int threads, int64_t shared_bytes, const void* stream, std::function<void()> thread,
              Grid grid = kAnyGrid);

// Whether a launch has failed since this was last asked; all of them have run then.
bool take_failure();

// --- called by threads -----------------------------------------------------------------------------------------------

unsigned char* shared_memory();
void wait_for_block();
void start_copy(void* to_shared, const void* from, bool there);
void end_copy_group();
void wait_for_copies(int pending);

// For what hopper.cpp adds: its state of the block that runs, gone when the next one begins.
struct Extension {
    virtual ~Extension() = default;
};
std::unique_ptr<Extension>& extension();
// The launch in front of this one has run when this returns.
void wait_for_predecessors();
// The thread waits until somebody wakes those at this place.
void sleep(const void* place);
void wake(const void* place);
// At any time from now on, but not before this thread's copies so far have landed where it says so.
void later(std::function<void()> event);
void after_copies(std::function<void()> event);
bool chance(unsigned one_in);
bool is_shared(const void* address, int64_t bytes);
[[noreturn]] void fail(const char* sentence);
void fail_outside(const char* sentence);  // where no thread is running: in what happens later

// Leaves `bytes` of this lane's for the others and returns what all 32 left, slot by slot, until the next exchange but
// one. The lanes must agree in `what` they are doing.
constexpr int kSlotBytes = 64;
void* exchange_bytes(const char* what, unsigned lanes, const void* own, int bytes);

template <typename T>
const T* exchange(const char* what, unsigned lanes, const T& own) {
    static_assert(sizeof(T) <= kSlotBytes, "a slot is too small");
    return static_cast<const T*>(exchange_bytes(what, lanes, &own, sizeof(T)));
}

// --- float16 and bfloat16, as csrc/cpu/floats.h has them -------------------------------------------------------------

float from_half(uint16_t bits);
uint16_t to_half(float value);
float from_bfloat(uint16_t bits);
uint16_t to_bfloat(float value);

}  // namespace emulation
}  // namespace hb
