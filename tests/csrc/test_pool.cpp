// How the pool shares out work: every number once, nobody waited for, and as many numbers as there can be.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/pool.h"
#include "testing.h"

using namespace testing;

namespace {

struct Range {
    int64_t begin, end;
};

// The ranges that a body was called with, in order.
std::vector<Range> ranges_of(int64_t threads, int64_t count) {
    std::mutex mutex;
    std::vector<Range> found;
    std::vector<char> is_running(static_cast<size_t>(threads), 0);
    hb::parallel_for(threads, count, [&](int64_t part, int64_t begin, int64_t end) {
        EXPECT(part >= 0 && part < threads, "part %d of %d", (int)part, (int)threads);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            char& mine = is_running[static_cast<size_t>(part)];
            EXPECT(!mine, "part %d twice at a time", (int)part);
            mine = 1;
            found.push_back({begin, end});
        }
        std::this_thread::yield();
        const std::lock_guard<std::mutex> lock(mutex);
        is_running[static_cast<size_t>(part)] = 0;
    });
    std::sort(found.begin(), found.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    return found;
}

void expect_all(int64_t threads, int64_t count) {
    int64_t next = 0;
    for (const Range& range : ranges_of(threads, count)) {
        EXPECT(range.begin == next && range.end > next, "%lld threads, %lld: from %lld to %lld after %lld",
               (long long)threads, (long long)count, (long long)range.begin, (long long)range.end, (long long)next);
        next = range.end;
    }
    EXPECT(next == count, "%lld threads, %lld: up to %lld", (long long)threads, (long long)count, (long long)next);
}

}  // namespace

TEST(every_number_is_in_one_range) {
    for (const int64_t threads : {1, 2, 3, 7, 64, 65, 130}) {
        for (const int64_t count : {0, 1, 2, 3, 31, 63, 64, 65, 129, 1000, 100003}) expect_all(threads, count);
    }
}

TEST(numbers_may_be_more_than_32_bits_hold) {
    for (const int64_t count : {(int64_t{1} << 32) - 1, int64_t{1} << 32, (int64_t{1} << 45) + 7, INT64_MAX}) {
        expect_all(3, count);
    }
}

TEST(what_a_thread_that_is_held_up_has_left_is_done_by_others) {
    constexpr int64_t kCount = 64;
    std::atomic<int64_t> done{0};
    std::atomic<bool> is_late{false};
    hb::parallel_for(2, kCount, [&](int64_t, int64_t begin, int64_t end) {
        if (begin == 0) {  // half of a share
            const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
            while (done < kCount - end && !is_late) {
                is_late = std::chrono::steady_clock::now() > limit;
                std::this_thread::yield();
            }
        }
        done += end - begin;
    });
    EXPECT(!is_late && done == kCount, "%d of %d", (int)done, (int)kCount);
}
