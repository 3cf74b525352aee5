// The pool: several callers at once, more threads than work, and a forked child.
#include <sys/wait.h>
#include <unistd.h>

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

#ifndef __SANITIZE_THREAD__  // which refuses threads in a forked child
TEST(a_forked_child_can_use_the_kernels) {
    const std::vector<float> x = normal_values(kCount);
    const std::vector<uint8_t> expected = quantized(x);
    EXPECT(quantize_and_compare(x, expected, 2), "the parent");
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(quantize_and_compare(x, expected, 2) ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's status is %d", status);
}
#endif
