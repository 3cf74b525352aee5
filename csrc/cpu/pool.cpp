// The pool behind parallel_for: see pool.h for the promises.
//
// Workers sleep on `wake_` until the generation goes up; worker w then takes part w + 1 of the job (the caller takes
// part 0) and the last one to finish wakes the caller. Started on first use, never stopped: the pool is leaked on
// purpose, so that no thread is joined while the process is ending.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace hb {

namespace {

class Pool {
  public:
    void run(int64_t parts, int64_t count, RangeBody body, const void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            body(context, 0, 0, count);
            return;
        }
        parts = grow_to(parts - 1) + 1;
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = {body, context, parts, count};
            unfinished_ = parts - 1;
            ++generation_;
        }
        if (parts > 1) wake_.notify_all();
        run_part(job_, 0);
        std::unique_lock<std::mutex> lock(state_);
        done_.wait(lock, [this] { return unfinished_ == 0; });
    }

  private:
    struct Job {
        RangeBody body;
        const void* context;
        int64_t parts;
        int64_t count;
    };

    static void run_part(const Job& job, int64_t part) {
        const int64_t share = job.count / job.parts;
        const int64_t longer = job.count % job.parts;  // the first `longer` parts have one more
        const int64_t begin = part * share + (part < longer ? part : longer);
        const int64_t end = begin + share + (part < longer ? 1 : 0);
        if (begin < end) job.body(job.context, part, begin, end);
    }

    // Starts workers until there are `wanted`; returns how many can be used (fewer when the system gives no more).
    int64_t grow_to(int64_t wanted) {
        // Workers never handle the process's signals: those belong to the threads that asked for them.
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_BLOCK, &every, &before);
        try {
            while (workers_ < wanted) {
                std::thread(&Pool::work, this, workers_).detach();
                ++workers_;
            }
        } catch (const std::system_error&) {
            wanted = workers_;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return wanted;
    }

    void work(int64_t worker) {
        uint64_t seen = 0;
        for (;;) {
            Job job{};
            {
                std::unique_lock<std::mutex> lock(state_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                job = job_;
            }
            if (worker + 1 >= job.parts) continue;
            run_part(job, worker + 1);
            std::lock_guard<std::mutex> lock(state_);
            if (--unfinished_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_;   // held by the caller whose job is running
    std::mutex state_;  // guards everything below but workers_, which only the holder of turn_ touches
    std::condition_variable wake_, done_;
    Job job_{};
    int64_t unfinished_ = 0;
    uint64_t generation_ = 0;
    int64_t workers_ = 0;
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
