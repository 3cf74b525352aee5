#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cpu/floats.h"
#include "fibre.h"

namespace hb {
namespace emulation {

Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace {

struct Copy {
    void* to;
    const void* from;  // null: zeros
    int64_t group;
};

constexpr int kCopyBytes = 16;

struct Thread {
    Fibre fibre;
    bool ended = false;
    int64_t exchanges = 0;
    int64_t groups = 0;  // of copies, closed
    std::vector<Copy> copies;
};

// Two sets of slots: a lane can be one exchange ahead of another one that still reads, never two.
struct Warp {
    alignas(16) char slots[2][kWarpSize * kSlotBytes];
    const char* what = nullptr;
    int arrived = 0;
    std::vector<int> ready;  // threads
};

struct FreeBytes {
    void operator()(unsigned char* bytes) const { free(bytes); }
};

class Block {
  public:
    Block(int threads, int64_t shared_bytes, std::mt19937_64& random)
        : random_(random), threads_(threads), warps_(threads / kWarpSize), shared_bytes_(shared_bytes) {
        for (std::unique_ptr<Thread>& thread : threads_) thread = std::make_unique<Thread>();
        // Exactly as many bytes as were asked for, so that AddressSanitizer sees the first one beyond.
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, static_cast<size_t>(std::max<int64_t>(shared_bytes, 1))) != 0) abort();
        shared_.reset(static_cast<unsigned char*>(memory));
    }

    bool run(void (*body)());

    unsigned char* shared() { return shared_.get(); }
    bool is_shared(const void* address, int64_t bytes) const {
        const unsigned char* const place = static_cast<const unsigned char*>(address);
        return place >= shared_.get() && place + bytes <= shared_.get() + shared_bytes_;
    }
    Thread& current() { return *threads_[threadIdx.x]; }
    bool chance(unsigned one_in) { return random_() % one_in == 0; }

    void pause() { current().fibre.leave(); }
    void barrier();
    void* exchange(const char* what, unsigned lanes, const void* own, int bytes);
    [[noreturn]] void end_thread();
    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  private:
    int next_thread();
    void make_ready(int thread) { warps_[thread / kWarpSize].ready.push_back(thread); }

    std::mt19937_64& random_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Warp> warps_;
    std::unique_ptr<unsigned char, FreeBytes> shared_;
    int64_t shared_bytes_;
    size_t preferred_ = 0;
    int at_barrier_ = 0;
    int ended_ = 0;
    bool failed_ = false;
};

Block* block = nullptr;
const std::function<void()>* kernel = nullptr;

void thread_body() {
    (*kernel)();
    block->end_thread();
}

// -1 where nobody can go on.
int Block::next_thread() {
    if (chance(64)) preferred_ = random_() % warps_.size();
    size_t warp = chance(4) ? random_() % warps_.size() : preferred_;
    for (size_t tried = 0; warps_[warp].ready.empty(); ++tried) {
        if (tried == warps_.size()) return -1;
        warp = (warp + 1) % warps_.size();
    }
    std::vector<int>& ready = warps_[warp].ready;
    std::swap(ready[random_() % ready.size()], ready.back());
    const int thread = ready.back();
    ready.pop_back();
    return thread;
}

bool Block::run(void (*body)()) {
    memset(shared_.get(), 0xff, static_cast<size_t>(shared_bytes_));
    at_barrier_ = ended_ = 0;
    const int count = static_cast<int>(threads_.size());
    for (Warp& warp : warps_) warp.arrived = 0;
    for (int i = 0; i < count; ++i) {
        Thread& thread = *threads_[i];
        thread.fibre.begin(body);
        thread.ended = false;
        thread.exchanges = thread.groups = 0;
        thread.copies.clear();
        make_ready(i);
    }
    while (!failed_ && ended_ < count) {
        const int thread = next_thread();
        if (thread < 0) {
            fprintf(stderr, "emulation: of %d threads %d have ended and %d wait at a barrier; none can go on\n", count,
                    ended_, at_barrier_);
            return false;
        }
        threadIdx.x = static_cast<unsigned>(thread);
        threads_[thread]->fibre.resume();
    }
    return !failed_;
}

void Block::fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emulation: thread %u of block %u: ", threadIdx.x, blockIdx.x);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    failed_ = true;
    pause();
    abort();  // nobody resumes it
}

void Block::end_thread() {
    current().ended = true;
    ++ended_;
    pause();
    abort();  // nobody resumes it
}

void Block::barrier() {
    const int count = static_cast<int>(threads_.size());
    if (++at_barrier_ < count) return pause();
    at_barrier_ = 0;
    for (int i = 0; i < count; ++i) make_ready(i);
    pause();  // the last to come need not be the first to go
}

void* Block::exchange(const char* what, unsigned lanes, const void* own, int bytes) {
    if (lanes != kAllLanes) fail("%s among lanes %08x; only whole warps are emulated", what, lanes);
    const int number = static_cast<int>(threadIdx.x) / kWarpSize;
    Warp& warp = warps_[number];
    if (warp.arrived == 0) warp.what = what;
    if (strcmp(warp.what, what) != 0) fail("%s while other lanes are at %s", what, warp.what);
    char* const slots = warp.slots[current().exchanges++ % 2];
    memcpy(slots + lane() * bytes, own, static_cast<size_t>(bytes));
    if (++warp.arrived == kWarpSize) {
        warp.arrived = 0;
        for (int i = 0; i < kWarpSize; ++i) make_ready(number * kWarpSize + i);
    }
    pause();
    return slots;
}

void land(const Copy& copy) {
    if (copy.from == nullptr) {
        memset(copy.to, 0, kCopyBytes);
    } else {
        memcpy(copy.to, copy.from, kCopyBytes);
    }
}

std::mutex one_launch;
bool failure = false;
std::mt19937_64 random_numbers;

}  // namespace

void run_grid(unsigned blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (threads < 1 || threads > kMostThreads || threads % kWarpSize != 0 || shared_bytes > kMostSharedBytes) {
        fprintf(stderr, "emulation: %d threads with %ld bytes of shared memory are not accepted\n", threads,
                static_cast<long>(shared_bytes));
        failure = true;
        return;
    }
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers);
    Block one(threads, shared_bytes, random_numbers);
    block = &one;
    kernel = &thread;
    gridDim.x = blocks;
    blockDim.x = static_cast<unsigned>(threads);
    for (const unsigned index : order) {
        blockIdx.x = index;
        if (!one.run(thread_body)) {
            failure = true;
            break;
        }
    }
    block = nullptr;
}

bool take_failure() {
    const std::lock_guard<std::mutex> lock(one_launch);
    const bool failed = failure;
    failure = false;
    return failed;
}

unsigned char* shared_memory() {
    return block->shared();
}

void wait_for_block() {
    block->barrier();
}

void start_copy(void* to_shared, const void* from, bool there) {
    if (!block->is_shared(to_shared, kCopyBytes)) block->fail("a copy goes outside of the shared memory");
    const uintptr_t both = reinterpret_cast<uintptr_t>(to_shared) | reinterpret_cast<uintptr_t>(from);
    if (both % kCopyBytes != 0) block->fail("a copy of %d bytes is not aligned to them", kCopyBytes);
    Thread& thread = block->current();
    const Copy copy = {to_shared, there ? from : nullptr, thread.groups};
    if (block->chance(8)) {
        land(copy);
    } else {
        thread.copies.push_back(copy);
    }
}

void end_copy_group() {
    ++block->current().groups;
}

void wait_for_copies(int pending) {
    Thread& thread = block->current();
    std::vector<Copy>& copies = thread.copies;
    auto due = [&](const Copy& copy) { return copy.group < thread.groups - pending; };
    for (const Copy& copy : copies) {
        if (due(copy)) land(copy);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

void* exchange_bytes(const char* what, unsigned lanes, const void* own, int bytes) {
    return block->exchange(what, lanes, own, bytes);
}

float from_half(uint16_t bits) {
    return hb::from_half(bits);
}
uint16_t to_half(float value) {
    return hb::to_half(value);
}
float from_bfloat(uint16_t bits) {
    return hb::from_bfloat(bits);
}
uint16_t to_bfloat(float value) {
    return hb::to_bfloat(value);
}

}  // namespace emulation
}  // namespace hb

// The order of everything that follows; tests print it.
extern "C" HB_API void hb_emulation_seed(uint64_t seed) {
    hb::emulation::random_numbers.seed(seed);
}
