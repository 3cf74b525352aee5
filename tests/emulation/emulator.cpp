#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
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
constexpr size_t kNoWarp = static_cast<size_t>(-1);
constexpr size_t kSharedAlignment = 1024;  // the most that a kernel asks for

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
        if (posix_memalign(&memory, kSharedAlignment, static_cast<size_t>(std::max<int64_t>(shared_bytes, 1))) != 0)
            abort();
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
    void sleep(const void* place);
    void wake(const void* place);
    void later(std::function<void()> event);
    void run_event(size_t which);
    std::unique_ptr<Extension>& extension() { return extension_; }
    void* exchange(const char* what, unsigned lanes, const void* own, int bytes);
    [[noreturn]] void end_thread();
    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
    // The same from outside of threads; nobody goes on.
    void fail_outside(const char* sentence) {
        fprintf(stderr, "emulation: block %u: %s\n", blockIdx.x, sentence);
        failed_ = true;
    }

  private:
    int next_thread();
    int ready_thread();
    int take_ready(size_t warp);
    void make_ready(int thread) { warps_[thread / kWarpSize].ready.push_back(thread); }

    std::mt19937_64& random_;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Warp> warps_;
    std::unique_ptr<unsigned char, FreeBytes> shared_;
    int64_t shared_bytes_;
    std::multimap<const void*, int> sleepers_;
    std::vector<std::function<void()>> events_;
    std::unique_ptr<Extension> extension_;
    size_t preferred_ = 0;
    size_t held_back_ = kNoWarp;
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

// -1 where nobody can go on. What may happen at any time happens now and then, and at the latest when everybody waits
// but for the warp that is held back.
int Block::next_thread() {
    if (!events_.empty() && chance(64)) run_event(random_() % events_.size());
    int thread = ready_thread();
    while (thread < 0 && !events_.empty()) {
        run_event(random_() % events_.size());
        thread = ready_thread();
    }
    return thread < 0 && held_back_ != kNoWarp ? take_ready(held_back_) : thread;
}

int Block::ready_thread() {
    if (chance(64)) preferred_ = random_() % warps_.size();
    size_t warp = chance(4) ? random_() % warps_.size() : preferred_;
    for (size_t tried = 0; warp == held_back_ || warps_[warp].ready.empty(); ++tried) {
        if (tried == warps_.size()) return -1;
        warp = (warp + 1) % warps_.size();
    }
    return take_ready(warp);
}

int Block::take_ready(size_t warp) {
    std::vector<int>& ready = warps_[warp].ready;
    if (ready.empty()) return -1;
    std::swap(ready[random_() % ready.size()], ready.back());
    const int thread = ready.back();
    ready.pop_back();
    return thread;
}

bool Block::run(void (*body)()) {
    memset(shared_.get(), 0xff, static_cast<size_t>(shared_bytes_));
    at_barrier_ = ended_ = 0;
    held_back_ = warps_.size() > 1 && chance(2) ? random_() % warps_.size() : kNoWarp;
    sleepers_.clear();
    events_.clear();
    extension_.reset();
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
                    ended_, at_barrier_ + static_cast<int>(sleepers_.size()));
            return false;
        }
        threadIdx.x = static_cast<unsigned>(thread);
        threads_[thread]->fibre.resume();
    }
    if (!failed_ && !events_.empty()) {
        fprintf(stderr, "emulation: block %u ended with %zu copies under way\n", blockIdx.x, events_.size());
        return false;
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

void Block::sleep(const void* place) {
    sleepers_.emplace(place, static_cast<int>(threadIdx.x));
    pause();
}

void Block::wake(const void* place) {
    const auto range = sleepers_.equal_range(place);
    for (auto sleeper = range.first; sleeper != range.second; ++sleeper) make_ready(sleeper->second);
    sleepers_.erase(range.first, range.second);
}

void Block::later(std::function<void()> event) {
    events_.push_back(std::move(event));
    if (chance(8)) run_event(events_.size() - 1);
}

void Block::run_event(size_t which) {
    const std::function<void()> event = std::move(events_[which]);
    events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(which));
    event();
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

// A thread's copies of the groups before `group`.
void land_copies(Thread& thread, int64_t group) {
    std::vector<Copy>& copies = thread.copies;
    auto due = [&](const Copy& copy) { return copy.group < group; };
    for (const Copy& copy : copies) {
        if (due(copy)) land(copy);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

// A launch runs as late as it may: when the next one is made that waits for it, or when its status is asked for.
struct Launch {
    unsigned blocks;
    int threads;
    int64_t shared_bytes;
    std::function<void()> thread;
    std::shared_ptr<Launch> before;  // may still be running
    bool begun = false;
};

std::mutex one_launch;
bool failure = false;
const void* callers_stream = nullptr;
int device_at_hand = kHopperDevice;
std::mt19937_64 random_numbers;
std::shared_ptr<Launch> last_launch;
Launch* running_launch = nullptr;

// Runs a launch, from within a thread of the one behind it too. The one before it has run when it ends.
void finish(Launch* launch) {
    if (launch == nullptr || launch->begun) return;
    launch->begun = true;
    std::vector<unsigned> order(launch->blocks);
    for (unsigned i = 0; i < launch->blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers);
    const Dimension places[] = {threadIdx, blockIdx, blockDim, gridDim};
    Block* const outer_block = block;
    const std::function<void()>* const outer_kernel = kernel;
    Launch* const outer_launch = running_launch;
    Block one(launch->threads, launch->shared_bytes, random_numbers);
    for (const unsigned index : order) {
        block = &one;
        kernel = &launch->thread;
        running_launch = launch;
        gridDim.x = launch->blocks;
        blockDim.x = static_cast<unsigned>(launch->threads);
        blockIdx.x = index;
        if (!one.run(thread_body)) {
            failure = true;
            break;
        }
    }
    block = outer_block;
    kernel = outer_kernel;
    running_launch = outer_launch;
    threadIdx = places[0], blockIdx = places[1], blockDim = places[2], gridDim = places[3];
    finish(launch->before.get());
}

}  // namespace

void run_grid(unsigned blocks, int threads, int64_t shared_bytes, const void* stream, std::function<void()> thread,
              Grid grid) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (stream != callers_stream) {
        fprintf(stderr, "emulation: a launch on stream %p; its caller's is %p\n", stream, callers_stream);
        failure = true;
        return;
    }
    const int64_t most_shared_bytes = grid == kHopperGrid ? kMostHopperSharedBytes : kMostSharedBytes;
    if (threads < 1 || threads > kMostThreads || threads % kWarpSize != 0 || shared_bytes > most_shared_bytes) {
        fprintf(stderr, "emulation: %d threads with %ld bytes of shared memory are not accepted\n", threads,
                static_cast<long>(shared_bytes));
        failure = true;
        return;
    }
    if (grid != kHopperGrid) finish(last_launch.get());
    last_launch = std::make_shared<Launch>(
        Launch{blocks, threads, shared_bytes, std::move(thread), grid == kHopperGrid ? last_launch : nullptr});
}

bool take_failure() {
    const std::lock_guard<std::mutex> lock(one_launch);
    finish(last_launch.get());
    last_launch.reset();
    const bool failed = failure;
    failure = false;
    return failed;
}

int device() {
    return device_at_hand;
}

void wait_for_predecessors() {
    finish(running_launch->before.get());
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
    land_copies(thread, thread.groups - pending);
}

void after_copies(std::function<void()> event) {
    Thread& thread = block->current();
    const int64_t group = ++thread.groups;
    block->later([&thread, group, event] {
        if (thread.ended && !thread.copies.empty()) fail_outside("a thread ended before its copies");
        land_copies(thread, group);
        event();
    });
}

void sleep(const void* place) {
    block->sleep(place);
}
void wake(const void* place) {
    block->wake(place);
}
void later(std::function<void()> event) {
    block->later(std::move(event));
}
bool chance(unsigned one_in) {
    return block->chance(one_in);
}
bool is_shared(const void* address, int64_t bytes) {
    return block->is_shared(address, bytes);
}
void fail(const char* sentence) {
    block->fail("%s", sentence);
}
void fail_outside(const char* sentence) {
    block->fail_outside(sentence);
}
std::unique_ptr<Extension>& extension() {
    return block->extension();
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

// The stream of the calls that follow.
extern "C" HB_API void hb_emulation_stream(const void* stream) {
    hb::emulation::callers_stream = stream;
}

// The device of the calls that follow.
extern "C" HB_API void hb_emulation_device(int number) {
    hb::emulation::device_at_hand = number;
}

// The order of everything that follows; tests print it.
extern "C" HB_API void hb_emulation_seed(uint64_t seed) {
    hb::emulation::random_numbers.seed(seed);
}
