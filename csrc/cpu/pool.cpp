// The pool behind parallel_for: see pool.h for the promises.
//
// A job is cut into a few pieces more than threads; whoever is free takes the next one, so that a thread that the
// system holds up costs a piece and not a share. Which threads those are: an OpenMP runtime's where hb_use_parallel
// has handed one over, because the operators between ours keep its threads awake and two pools would take the cores
// from each other; else workers of our own.
//
// A worker is handed a job by a pointer of its own, which it clears when
// it is done; before it sleeps it looks for the next job for a while (kPatience), because the layers of a model follow
// each other by some ten microseconds and waking a thread takes as long. Started on first use, never stopped: the pool
// is leaked on purpose, so that no thread is joined while the process is ending.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "halfbyte.h"

namespace hb {

namespace {

constexpr std::chrono::microseconds kPatience(100);
constexpr int64_t kPiecesPerThread = 4;

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

class Job {
  public:
    Job(int64_t threads, int64_t count, RangeBody body, const void* context)
        : body_(body), context_(context), count_(count), piece_(count / (threads * kPiecesPerThread) + 1) {}

    // One thread's share: takes pieces until there are none.
    void work() {
        const int64_t part = next_part_.fetch_add(1, std::memory_order_relaxed);
        for (;;) {
            const int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
            if (begin >= count_) return;
            body_(context_, part, begin, begin + piece_ < count_ ? begin + piece_ : count_);
        }
    }

  private:
    const RangeBody body_;
    const void* const context_;
    const int64_t count_, piece_;
    std::atomic<int64_t> next_{0}, next_part_{0};
};

class Worker {
  public:
    // The caller's side: `job` stays alive until is_idle().
    void hand(Job* job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_.store(job, std::memory_order_release);
        }
        changed_.notify_all();
    }
    bool is_idle() const { return job_.load(std::memory_order_acquire) == nullptr; }
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
            job_.load(std::memory_order_acquire)->work();
            {
                std::lock_guard<std::mutex> lock(mutex_);
                job_.store(nullptr, std::memory_order_release);
            }
            changed_.notify_all();
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<Job*> job_{nullptr};
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
        if (const hb_parallel parallel = parallel_.load(std::memory_order_relaxed)) {
            parallel([](void* same) { static_cast<Job*>(same)->work(); }, &job, static_cast<unsigned>(threads), 0);
        } else {
            run_on_workers(job, grow_to(static_cast<size_t>(threads - 1)));
        }
    }

    void use(hb_parallel parallel) { parallel_.store(parallel, std::memory_order_relaxed); }

  private:
    void run_on_workers(Job& job, size_t helpers) {
        for (size_t i = 0; i < helpers; ++i) workers_[i].hand(&job);
        job.work();
        for (size_t i = 0; i < helpers; ++i) workers_[i].wait_until_idle();
    }

    // Starts workers until there are `wanted`; returns how many can be used (fewer when the system gives no more).
    size_t grow_to(size_t wanted) {
        if (workers_.size() >= wanted) return wanted;
        // Workers never handle the process's signals: those belong to the threads that asked for them.
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_BLOCK, &every, &before);
        try {
            while (workers_.size() < wanted) {
                workers_.emplace_back();
                Worker* const worker = &workers_.back();
                std::thread([worker] { worker->work(); }).detach();
            }
        } catch (const std::system_error&) {
            workers_.pop_back();
            wanted = workers_.size();
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
    the_pool().run(parts, count, body, context);
}

}  // namespace hb

extern "C" void hb_use_parallel(hb_parallel parallel) {
    hb::the_pool().use(parallel);
}
