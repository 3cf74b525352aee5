// The pool: several callers at once, more threads than work, another runtime's threads, and a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kCount = 300001;

bool quantize_and_compare(const std::vector<float>& x, const std::vector<uint8_t>& expected, int64_t threads) {
    std::vector<uint8_t> packed = poisoned<uint8_t>((kCount + 1) / 2);
    std::vector<float> absmax = poisoned<float>(ceil_div(kCount, 64));
    auto args = args_with<hb_quantize4_args>(threads);
    args.x = x.data(), args.n = kCount, args.blocksize = 64, args.packed = packed.data(), args.absmax = absmax.data();
    return hb_quantize4(&args) == HB_OK && packed == expected;
}

std::vector<uint8_t> quantized(const std::vector<float>& x) {
    std::vector<uint8_t> packed = poisoned<uint8_t>((kCount + 1) / 2);
    std::vector<float> absmax = poisoned<float>(ceil_div(kCount, 64));
    auto args = args_with<hb_quantize4_args>(1);
    args.x = x.data(), args.n = kCount, args.blocksize = 64, args.packed = packed.data(), args.absmax = absmax.data();
    EXPECT(hb_quantize4(&args) == HB_OK, "one thread");
    return packed;
}

// A runtime that gives as many threads as asked for, or fewer, as OpenMP may.
std::atomic<int> teams{0};
unsigned most_threads = 0;

void parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags) {
    EXPECT(flags == 0 && threads > 1, "flags %u, threads %u", flags, threads);
    ++teams;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads && i < most_threads; ++i) others.emplace_back(body, context);
    body(context);
    for (std::thread& other : others) other.join();
}

}  // namespace

TEST(callers_at_once_get_their_own_results) {
    const std::vector<float> x = normal_values(kCount);
    const std::vector<uint8_t> expected = quantized(x);
    bool good[4] = {};
    std::vector<std::thread> callers;
    for (bool& mine : good) {
        callers.emplace_back([&] {
            mine = true;
            for (int64_t round = 0; round < 20; ++round) {
                mine = quantize_and_compare(x, expected, round % 5 + 1) && mine;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const bool mine : good) EXPECT(mine, "a caller saw another result");
}

TEST(calls_run_on_the_threads_that_were_handed_over) {
    const std::vector<float> x = normal_values(kCount);
    const std::vector<uint8_t> expected = quantized(x);
    hb_use_parallel(parallel);
    for (const unsigned most : {1u, 2u, 7u}) {
        most_threads = most;
        const int before = teams;
        EXPECT(quantize_and_compare(x, expected, 4), "at most %u threads", most);
        EXPECT(teams == before + 1, "%d teams", teams - before);
    }
    hb_use_parallel(nullptr);
    const int before = teams;
    EXPECT(quantize_and_compare(x, expected, 4) && teams == before, "its own threads again");
}

#ifndef __SANITIZE_THREAD__  // which refuses threads in a forked child
TEST(a_forked_child_can_use_the_kernels) {
    const std::vector<float> x = normal_values(kCount);
    const std::vector<uint8_t> expected = quantized(x);
    for (const hb_parallel handed : {hb_parallel{nullptr}, hb_parallel{parallel}}) {
        hb_use_parallel(handed);
        EXPECT(quantize_and_compare(x, expected, 2), "the parent");
        const int before = teams;
        fflush(stdout);
        const pid_t child = fork();  // in which no other runtime's threads live
        if (child == 0) _exit(quantize_and_compare(x, expected, 2) && teams == before ? 0 : 1);
        int status = -1;
        waitpid(child, &status, 0);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's status is %d", status);
    }
    hb_use_parallel(nullptr);
}
#endif
