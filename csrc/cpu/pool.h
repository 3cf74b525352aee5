// One small pool of persistent threads for the whole process, our own or an OpenMP runtime's (hb_use_parallel). Not a
// scheduler: one job at a time.
#pragma once

#include <stdint.h>

namespace hb {

// Calls body(context, part, begin, end) for ranges that make up [0, count), a few more than `threads`, at most
// `threads` at a time; `part` is below `threads` and no two running calls share it. Returns when all are done.
//
// Any thread may call. While one caller holds the pool, others run their whole range themselves (part 0), so several
// callers never wait for each other and never oversubscribe the machine. A forked child starts with a fresh pool. Every
// range is computed in the caller's floating-point mode (float_mode.h), whatever a thread's own is.
using RangeBody = void (*)(const void* context, int64_t part, int64_t begin, int64_t end);
void parallel_ranges(int64_t threads, int64_t count, RangeBody body, const void* context) noexcept;

// The same for a callable body(part, begin, end).
template <typename Body>
void parallel_for(int64_t threads, int64_t count, const Body& body) noexcept {
    parallel_ranges(
        threads, count,
        [](const void* context, int64_t part, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(context))(part, begin, end);
        },
        &body);
}

// Calls body(context) on this thread and keeps up to `threads` threads, itself among them, ready for its
// parallel_ranges until it returns. For many small jobs with little between them: the others do nothing else meanwhile.
void keep_together(int64_t threads, void (*body)(void* context), void* context) noexcept;

// The same for a callable body().
template <typename Body>
void keep_together(int64_t threads, Body& body) noexcept {
    keep_together(threads, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// Threads worth using for `work` elementary steps (a value quantized, a weight multiplied): waking one costs some
// microseconds.
inline int64_t threads_for(int64_t threads, int64_t work) {
    const int64_t useful = work / 32768 + 1;
    return threads < useful ? threads : useful;
}

// The same for a matmul of M rows with a weight [N, K]: more rows cost little more while the weight is what is read.
inline int64_t threads_for_matmul(int64_t threads, int64_t M, int64_t N, int64_t K) {
    return threads_for(threads, N * (K / 8 + 1) * (M < 8 ? M : 8));
}

}  // namespace hb
