// The pool: several callers at once, more threads than work, another runtime's threads, and a forked child.
#include <sys/wait.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#include <atomic>
#include <deque>
#include <thread>

#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kCount = 300001;

// A product in 4 bits and one in 8, on tiles where the level has them. Both outputs.
std::vector<uint16_t> multiply(int64_t threads) {
    constexpr int64_t kM = 20, kN = 70, kK = 640;
    const std::vector<uint16_t> x(static_cast<size_t>(kM * kK), bfloat(1.5f));
    const std::vector<int8_t> codes(static_cast<size_t>(kN * kK), 0x5b);
    const std::vector<float> absmax(static_cast<size_t>(kN * kK / 64), 0.75f);
    std::vector<uint16_t> out = poisoned<uint16_t>(2 * kM * kN);
    const Workspace workspace(1 << 22);
    auto of4 = args_with<hb_linear4_args>(threads);
    of4.x = x.data(), of4.x_dtype = HB_BFLOAT16, of4.M = kM, of4.N = kN, of4.K = kK, of4.blocksize = 64;
    of4.packed = reinterpret_cast<const uint8_t*>(codes.data()), of4.absmax = absmax.data(), of4.out = out.data();
    auto of8 = args_with<hb_linear8_args>(threads);
    of8.x = x.data(), of8.x_dtype = HB_BFLOAT16, of8.M = kM, of8.N = kN, of8.K = kK, of8.codes = codes.data();
    of8.absmax = absmax.data(), of8.out = out.data() + kM * kN;
    workspace.give_to(of4.call), workspace.give_to(of8.call);
    EXPECT(hb_linear4(&of4) == HB_OK && hb_linear8(&of8) == HB_OK, "%d threads", (int)threads);
    return out;
}

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

// A chain of sums, each of which reads what the one before it has written, and one product with the last.
struct Chain {
    static constexpr int64_t kSteps = 200, kRows = 4, kN = 96, kK = 4096;
    std::vector<float> x = normal_values(kRows * kK), one = normal_values(kRows * kK, 1e-3f);
    std::vector<float> sums = poisoned<float>(kRows * kK), out = poisoned<float>(kRows * kN);
    std::vector<int8_t> codes = std::vector<int8_t>(static_cast<size_t>(kN * kK), 3);
    std::vector<float> absmax = normal_values(kN);
    std::vector<hb_add_args> adds;
    hb_linear8_args linear;
    std::vector<hb_step> steps;
    Workspace workspace{1 << 22};

    explicit Chain(int64_t threads) {
        for (int64_t i = 0; i < kSteps; ++i) {
            auto args = args_with<hb_add_args>(threads);
            args.a = i == 0 ? x.data() : sums.data(), args.b = one.data(), args.n = kRows * kK, args.out = sums.data();
            adds.push_back(args);
        }
        linear = args_with<hb_linear8_args>(threads);
        linear.x = sums.data(), linear.M = kRows, linear.N = kN, linear.K = kK, linear.codes = codes.data();
        linear.absmax = absmax.data(), linear.out = out.data(), linear.outlier_rule = HB_OUTLIERS_ALL;
        workspace.give_to(linear.call);
        for (const hb_add_args& args : adds) steps.push_back({HB_STEP_ADD, &args, 1});
        steps.push_back({HB_STEP_LINEAR8, &linear, 1});
    }
    hb_status run(int64_t threads) { return hb_run(steps.data(), static_cast<int64_t>(steps.size()), threads); }
};

TEST(a_run_gives_what_the_calls_give) {
    for (const hb_parallel handed : {hb_parallel{nullptr}, hb_parallel{parallel}}) {
        hb_use_parallel(handed);
        for (const int64_t members : {1, 2, 5}) {
            most_threads = static_cast<unsigned>(any_of({1, members, 9}));
            Chain chain(any_of({1, 2, 7}));  // a step may ask for more than the team has, or fewer
            const int before = teams;
            EXPECT(chain.run(members) == HB_OK, "%d members", (int)members);
            EXPECT(members == 1 || teams - before == (handed != nullptr), "%d teams", teams - before);
            const std::vector<float> found = chain.out;
            for (const hb_add_args& args : chain.adds) hb_add(&args);
            hb_linear8(&chain.linear);
            EXPECT(found == chain.out, "%d members", (int)members);
        }
    }
    hb_use_parallel(nullptr);
}

TEST(runs_at_once_do_not_disturb_each_other) {
    std::vector<std::thread> callers;
    std::deque<Chain> chains;  // made here: random numbers come from one generator
    bool good[4] = {};
    for (bool& mine : good) {
        Chain& chain = chains.emplace_back(3);
        callers.emplace_back([&] {
            mine = chain.run(1) == HB_OK;
            const std::vector<float> alone = chain.out;
            for (int round = 0; round < 5; ++round) mine = chain.run(3) == HB_OK && chain.out == alone && mine;
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const bool mine : good) EXPECT(mine, "a caller saw another result");
}

#ifdef __x86_64__
namespace {

constexpr unsigned kFlushing = 0x8040;  // subnormal results and operands are zeros
constexpr unsigned kOccurred = 0x3f;    // flags of exceptions: the processor sets them
constexpr int64_t kSubnormals = 1 << 20;

// The mode of a runtime's thread before a call, and whether it was the one afterwards, each time.
unsigned mode_of_others = 0;
bool others_keep_their_mode = true;

// What the processor says of this thread: whether its tiles hold anything, or their configuration does.
bool uses_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTile = 1u << 24, kOsSaves = 1u << 27, kSaysWhatIsUsed = 1u << 2;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsSaves) == 0) return false;
    if (!__get_cpuid_count(0xd, 1, &a, &b, &c, &d) || (a & kSaysWhatIsUsed) == 0) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));
    return (a >> 17 & 3) != 0;
}
bool others_release_tiles = true;

// A runtime with one more thread, in a mode of its own. A call's share is done by it alone, before the caller's; in a
// run both are there, since it waits for what the caller has for it.
template <bool kIsFirst>
void lend_one(void (*body)(void*), void* context, unsigned, unsigned) {
    std::thread other([=] {
        _mm_setcsr(mode_of_others);
        body(context);
        others_keep_their_mode = (_mm_getcsr() & ~kOccurred) == mode_of_others && others_keep_their_mode;
        others_release_tiles = !uses_tiles() && others_release_tiles;
    });
    if (kIsFirst) other.join();
    body(context);
    if (!kIsFirst) other.join();
}

// Sums of two subnormal numbers, in a call and in a run: zeros where they are flushed. How many are right.
int64_t right_sums(int64_t threads, float expected, bool lends) {
    const std::vector<float> x(static_cast<size_t>(kSubnormals), 0x1p-130f);
    int64_t right = 0;
    for (const bool in_run : {false, true}) {
        std::vector<float> out = poisoned<float>(kSubnormals);
        auto args = args_with<hb_add_args>(threads);
        args.a = args.b = x.data(), args.n = kSubnormals, args.out = out.data();
        const hb_step step = {HB_STEP_ADD, &args, 1};
        hb_use_parallel(!lends ? nullptr : in_run ? lend_one<false> : lend_one<true>);
        EXPECT((in_run ? hb_run(&step, 1, threads) : hb_add(&args)) == HB_OK, "in a run: %d", in_run);
        for (const float sum : out) right += memcmp(&sum, &expected, sizeof sum) == 0;
    }
    return right;
}

}  // namespace

TEST(threads_work_in_their_callers_mode_and_keep_their_own) {
    const unsigned plain = _mm_getcsr() & ~(kOccurred | kFlushing), flushing = plain | kFlushing;
    for (const bool lends : {false, true}) {
        int64_t threads = 11;  // more in every turn than before: the pool's new threads begin in their maker's mode
        for (const unsigned mine : {flushing, plain, flushing}) {
            mode_of_others = mine ^ kFlushing;
            _mm_setcsr(mine);
            const int64_t right = right_sums(threads, mine == plain ? 0x1p-129f : 0.0f, lends);
            const unsigned after = _mm_getcsr();
            _mm_setcsr(plain);
            EXPECT(right == 2 * kSubnormals, "%x, others %x: %lld", mine, mode_of_others, (long long)right);
            EXPECT((after & ~kOccurred) == mine, "%x became %x", mine, after);
            EXPECT(right_sums(threads, 0x1p-129f, lends) == 2 * kSubnormals, "another caller, after %x", mine);
            ++threads;
        }
    }
    hb_use_parallel(nullptr);
    EXPECT(others_keep_their_mode, "a thread that was lent came back in another mode");
}

// Attention of rows that each see themselves alone, of heads that fit tiles.
std::vector<uint16_t> attend(int64_t threads) {
    constexpr int64_t kRows = 64, kSize = 64;
    std::vector<uint16_t> values(static_cast<size_t>(kRows * kSize)), out = poisoned<uint16_t>(kRows * kSize);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(0x3f00 + i % 256);
    std::vector<int64_t> tables, offsets = {0}, starts(kRows, 0);
    for (int64_t row = 0; row < kRows; ++row) tables.push_back(row), offsets.push_back(row + 1);
    auto args = args_with<hb_paged_attention_args>(threads);
    args.query = args.keys = args.values = values.data(), args.out = out.data();
    args.query_row_stride = args.query_head_stride = kSize;
    args.dtype = args.store_dtype = HB_BFLOAT16;
    args.T = args.S = args.blocks = kRows, args.H = args.G = args.block_tokens = args.max_blocks = 1;
    args.D = args.E = kSize, args.scale = 1;
    args.tables = tables.data(), args.offsets = offsets.data(), args.starts = starts.data();
    int64_t bytes = 0;
    EXPECT(hb_paged_attention_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(hb_paged_attention(&args) == HB_OK, "attention");
    EXPECT(out == values, "a row that sees one value");
    return out;
}

TEST(tiles_are_in_use_on_no_thread_after_attention) {
    mode_of_others = _mm_getcsr() & ~kOccurred;
    attend(1);
    EXPECT(!uses_tiles(), "the caller's");
    hb_use_parallel(lend_one<true>);
    attend(2);
    hb_use_parallel(nullptr);
    EXPECT(!uses_tiles() && others_release_tiles, "a thread that was lent");
}

TEST(tiles_are_in_use_on_no_thread_after_a_call) {
    mode_of_others = _mm_getcsr() & ~kOccurred;
    const std::vector<uint16_t> alone = multiply(1);
    EXPECT(!uses_tiles(), "the caller's");
    hb_use_parallel(lend_one<true>);
    EXPECT(multiply(2) == alone, "another thread's products");
    hb_use_parallel(nullptr);
    EXPECT(!uses_tiles() && others_release_tiles, "a thread that was lent");
}
#endif

#ifndef __SANITIZE_THREAD__  // which refuses threads in a forked child
TEST(a_forked_child_can_use_the_kernels) {
    const std::vector<float> x = normal_values(kCount);
    const std::vector<uint8_t> expected = quantized(x);
    const std::vector<uint16_t> products = multiply(1);
    for (const hb_parallel handed : {hb_parallel{nullptr}, hb_parallel{parallel}}) {
        hb_use_parallel(handed);
        EXPECT(quantize_and_compare(x, expected, 2), "the parent");
        const int before = teams;
        fflush(stdout);
        const pid_t child = fork();  // in which no other runtime's threads live
        if (child == 0) {
            _exit(quantize_and_compare(x, expected, 2) && multiply(2) == products && teams == before ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's status is %d", status);
    }
    hb_use_parallel(nullptr);
}
#endif
