// The pool behind parallel_for: see pool.h for the promises.
//
// Each thread has a share of a job, all of it side by side, and works through it in pieces, large ones first; what it
// reads ahead at the end of one is then what the next one begins with. Who is done takes from the far end of what
// others have left, so that a thread that the system holds up costs a piece and not a share. Which threads those are:
// an OpenMP runtime's where hb_use_parallel has handed one over, because the operators between ours keep its threads
// awake and two pools would take the cores from each other; else workers of our own.
//
// A worker is handed a task by a pointer of its own, which it clears when it is done; before it sleeps it looks for the
// next one for a while (kPatience), because the layers of a model follow each other by some ten microseconds and waking
// a thread takes as long. Started on first use, never stopped: the pool is leaked on purpose, so that no thread is
// joined while the process is ending.
//
// Even an awake thread is some microseconds away, and a sequence of calls has hundreds of jobs. So a caller may keep a
// team together for a while: its threads watch one pointer, and a job costs the caller two exchanges of a cache line.
// A member that the system holds up before it has begun on a job is not waited for.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "float_mode.h"
#include "halfbyte.h"

namespace hb {

namespace {

constexpr std::chrono::microseconds kPatience(100);
// A piece is half of what is left of a share, but no less than a part of what it was.
constexpr int64_t kSmallestPieces = 32;
constexpr int64_t kMostShares = 64;  // more threads have some of them in common
constexpr int kUnitBits = 32;
constexpr uint64_t kMostUnits = (uint64_t{1} << kUnitBits) - 1;  // that a job is cut into

void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Whether `is_so` came true while it was watched for.
template <typename Condition>
bool watch(const Condition& is_so) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    do {
        for (int i = 0; i < 64; ++i) {
            if (is_so()) return true;
            breathe();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// What nobody has taken yet of some units that lie side by side: from the front by whose share they are, from the back
// by others.
class alignas(64) Share {
  public:
    struct Piece {
        int64_t begin, end;
        bool is_empty() const { return begin >= end; }
    };

    void put(int64_t begin, int64_t end) { left_.store(packed(begin, end), std::memory_order_relaxed); }
    // Half of what is left, but no less than `least` where there is so much.
    Piece from_front(int64_t least) {
        return take([least](Piece left) {
            const int64_t size = left.end - left.begin;
            return Piece{left.begin, left.begin + std::min(size, std::max(size / 2, least))};
        });
    }
    Piece from_back() {
        return take([](Piece left) { return Piece{left.begin + (left.end - left.begin) / 2, left.end}; });
    }

  private:
    template <typename Choose>
    Piece take(const Choose& choose) {
        uint64_t now = left_.load(std::memory_order_relaxed);
        for (;;) {
            const Piece left = {static_cast<int64_t>(now & kMostUnits), static_cast<int64_t>(now >> kUnitBits)};
            if (left.is_empty()) return left;
            const Piece piece = choose(left);
            const uint64_t rest =
                piece.begin == left.begin ? packed(piece.end, left.end) : packed(left.begin, piece.begin);
            if (left_.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return piece;
        }
    }
    static uint64_t packed(int64_t begin, int64_t end) {
        return static_cast<uint64_t>(end) << kUnitBits | static_cast<uint64_t>(begin);
    }

    std::atomic<uint64_t> left_;  // as put: most shares of a job are not there
};

class Job {
  public:
    Job(int64_t parts, int64_t count, RangeBody body, const void* context)
        : body_(body),
          context_(context),
          parts_(parts),
          count_(count),
          shares_(std::min(parts, kMostShares)),
          unit_(count / static_cast<int64_t>(kMostUnits) + 1),
          units_((count - 1) / unit_ + 1) {
        const int64_t each = units_ / shares_, more = units_ % shares_;
        smallest_ = each / kSmallestPieces + 1;
        for (int64_t i = 0, begin = 0; i < shares_; ++i) {
            const int64_t end = begin + each + (i < more ? 1 : 0);
            share_[i].put(begin, end);
            begin = end;
        }
    }

    // One thread's part: its share, then what others have left of theirs.
    void work() { work(next_part_.fetch_add(1, std::memory_order_relaxed)); }
    void work(int64_t part) {
        if (part >= parts_) return;
        const int64_t own = part % shares_;
        while (run(part, share_[own].from_front(smallest_))) {
        }
        for (int64_t i = 1; i < shares_;) {
            if (!run(part, share_[(own + i) % shares_].from_back())) ++i;
        }
    }

  private:
    // False where there is nothing in it.
    bool run(int64_t part, Share::Piece piece) {
        if (piece.is_empty()) return false;
        body_(context_, part, piece.begin * unit_, piece.end == units_ ? count_ : piece.end * unit_);
        return true;
    }

    const RangeBody body_;
    const void* const context_;
    const int64_t parts_, count_, shares_, unit_, units_;
    int64_t smallest_ = 1;
    std::atomic<int64_t> next_part_{0};
    Share share_[kMostShares];
};

// What several threads run at once, each in the mode of the caller.
struct Task {
    void (*body)(void* context);
    void* context;
    FloatMode mode;

    void work() const {
        const FloatModeScope scope(mode);
        body(context);
    }
};

// Which processors a team's threads run on. After a pause a thread may be woken beside another one on the same
// processor, and the system was seen to take 0.3 seconds to part them, in which both get half of it.
class Places {
  public:
    // Called by each thread as it joins. Who finds its processor taken goes to a free one of those it may use; from
    // there on the system moves it as it likes.
    void take() {
#if defined(__linux__)
        if (claim(sched_getcpu())) return;
        cpu_set_t allowed, free;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        CPU_ZERO(&free);
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &allowed) && !is_taken(cpu)) CPU_SET(cpu, &free);
        }
        if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof free, &free) != 0) return;
        claim(sched_getcpu());
        sched_setaffinity(0, sizeof allowed, &allowed);
#endif
    }

  private:
#if defined(__linux__)
    bool is_taken(int cpu) const { return (taken_[cpu / 64].load(std::memory_order_relaxed) >> (cpu % 64) & 1) != 0; }
    // Whether this thread is the first on it; so it is where nobody can tell.
    bool claim(int cpu) {
        if (cpu < 0 || cpu >= CPU_SETSIZE) return true;
        const uint64_t bit = uint64_t{1} << (cpu % 64);
        return (taken_[cpu / 64].fetch_or(bit, std::memory_order_relaxed) & bit) == 0;
    }

    std::atomic<uint64_t> taken_[CPU_SETSIZE / 64] = {};
#endif
};

// Threads that stay with one caller from one job to the next. The caller is part 0 of each.
class Team {
  public:
    Team(void (*body)(void* context), void* context) : lead_(body), context_(context) { places_.take(); }

    // What each thread of the team runs, the caller's among them.
    void take_part() {
        if (std::this_thread::get_id() == leader_) {
            own_ = this;
            lead_(context_);
            own_ = nullptr;
            is_open_.store(false, std::memory_order_release);
        } else {
            follow(next_part_.fetch_add(1, std::memory_order_relaxed));
        }
    }

    // The caller's side.
    void run(Job& job) {
        job_.store(&job);
        posted_.fetch_add(1);
        job.work(0);
        job_.store(nullptr);
        while (at_work_.load() != 0) breathe();
    }

    // The team that the calling thread keeps together, or null.
    static Team* own() { return own_; }

  private:
    // Who goes to work says so before looking for the job, and the caller takes the job away before looking who is at
    // work: in one order for all, so that nobody works on a job that has ended. Whoever comes too late for one job may
    // find the next, and that one a second time; both are harmless.
    void follow(int64_t part) {
        places_.take();
        for (int64_t seen = 0; await_job(seen);) {
            at_work_.fetch_add(1);
            if (Job* const job = job_.load()) job->work(part);
            at_work_.fetch_sub(1);
        }
    }

    // Whether there is another job after the `seen` ones; false where the team parts. Others may want the core.
    bool await_job(int64_t& seen) {
        const auto is_over = [&] { return posted_.load() != seen || !is_open_.load(std::memory_order_acquire); };
        while (!watch(is_over)) std::this_thread::yield();
        const int64_t posted = posted_.load();
        const bool is_new = posted != seen;
        seen = posted;
        return is_new;
    }

    void (*const lead_)(void* context);
    void* const context_;
    const std::thread::id leader_ = std::this_thread::get_id();
    Places places_;
    alignas(64) std::atomic<Job*> job_{nullptr};
    std::atomic<int64_t> posted_{0};
    std::atomic<bool> is_open_{true};
    alignas(64) std::atomic<int64_t> at_work_{0};
    std::atomic<int64_t> next_part_{1};
    static thread_local Team* own_;
};

thread_local Team* Team::own_ = nullptr;

class Worker {
  public:
    // The caller's side: `task` stays alive until is_idle().
    void hand(const Task* task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_.store(task, std::memory_order_release);
        }
        changed_.notify_all();
    }
    bool is_idle() const { return task_.load(std::memory_order_acquire) == nullptr; }
    void wait_until_idle() {
        if (watch([this] { return is_idle(); })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return is_idle(); });
    }

    // The thread's side.
    void work() {
        for (;;) {
            if (!watch([this] { return !is_idle(); })) {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [this] { return !is_idle(); });
            }
            const Task* const task = task_.load(std::memory_order_acquire);
            task->work();
            {
                std::lock_guard<std::mutex> lock(mutex_);
                task_.store(nullptr, std::memory_order_release);
            }
            changed_.notify_all();
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<const Task*> task_{nullptr};
};

class Pool {
  public:
    void run(int64_t threads, int64_t count, RangeBody body, const void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            body(context, 0, 0, count);
            return;
        }
        Job job(threads, count, body, context);
        start(threads, {[](void* same) { static_cast<Job*>(same)->work(); }, &job, float_mode()});
    }

    void keep_together(int64_t threads, void (*body)(void* context), void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            body(context);
            return;
        }
        Team team(body, context);
        start(threads, {[](void* same) { static_cast<Team*>(same)->take_part(); }, &team, float_mode()});
    }

    void use(hb_parallel parallel) { parallel_.store(parallel, std::memory_order_relaxed); }

  private:
    // The task on up to `threads` threads, the caller's among them; returns when it has ended on each.
    void start(int64_t threads, Task task) {
        if (const hb_parallel parallel = parallel_.load(std::memory_order_relaxed)) {
            parallel([](void* same) { static_cast<const Task*>(same)->work(); }, &task, static_cast<unsigned>(threads),
                     0);
            return;
        }
        const size_t helpers = grow_to(static_cast<size_t>(threads - 1));
        for (size_t i = 0; i < helpers; ++i) workers_[i].hand(&task);
        task.work();
        for (size_t i = 0; i < helpers; ++i) workers_[i].wait_until_idle();
    }

    // Starts workers until there are `wanted`; returns how many can be used (fewer when the system gives no more).
    size_t grow_to(size_t wanted) {
        if (workers_.size() >= wanted) return wanted;
        // Workers never handle the process's signals: those belong to the threads that asked for them.
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_BLOCK, &every, &before);
        size_t working = workers_.size();
        try {
            for (; working < wanted; ++working) {
                workers_.emplace_back();
                Worker* const worker = &workers_.back();
                std::thread([worker] { worker->work(); }).detach();
            }
        } catch (...) {  // no thread, or no memory for one
            while (workers_.size() > working) workers_.pop_back();
            wanted = working;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return wanted;
    }

    std::mutex turn_;             // held by the caller whose job is running; guards workers_
    std::deque<Worker> workers_;  // a deque never moves what it holds
    std::atomic<hb_parallel> parallel_{nullptr};
};

Pool* pool = nullptr;

void start_pool() {
    pool = new Pool;
}

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        start_pool();
        pthread_atfork(nullptr, nullptr, start_pool);  // the child has none of the parent's threads
    });
    return *pool;
}

}  // namespace

void parallel_ranges(int64_t threads, int64_t count, RangeBody body, const void* context) noexcept {
    const int64_t parts = threads < count ? threads : count;
    if (count <= 0) return;
    if (parts <= 1) {
        body(context, 0, 0, count);
        return;
    }
    if (Team* const team = Team::own()) {
        Job job(parts, count, body, context);
        team->run(job);
    } else {
        the_pool().run(parts, count, body, context);
    }
}

void keep_together(int64_t threads, void (*body)(void* context), void* context) noexcept {
    if (threads <= 1 || Team::own() != nullptr) {
        body(context);
    } else {
        the_pool().keep_together(threads, body, context);
    }
}

}  // namespace hb

extern "C" void hb_use_parallel(hb_parallel parallel) {
    hb::the_pool().use(parallel);
}
