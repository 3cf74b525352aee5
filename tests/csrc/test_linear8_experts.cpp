// The 8-bit matmul of rows with their experts' matrices against hb_linear8 on each expert alone: the same bits at every
// level, on any number of threads, however rows are spread over experts; and nothing of an expert without rows is read.
#include <algorithm>

#include "hidden.h"

using namespace testing;

namespace {

constexpr int64_t kRules[] = {HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH, HB_OUTLIERS_ALL};

struct Experts {
    int64_t E, N, K;
    std::vector<int8_t> codes;
    std::vector<float> absmax, bias;

    Experts(int64_t experts, int64_t n, int64_t k)
        : E(experts), N(n), K(k), absmax(normal_values(E * N)), bias(normal_values(E * N)) {
        for (int64_t i = 0; i < E * N * K; ++i) codes.push_back(static_cast<int8_t>(generator() & 0xff));
    }
};

// Rows of x, some with outliers, and who has them.
template <typename T>
struct Given {
    std::vector<T> x;
    std::vector<int64_t> ends;
    int64_t M, rule, threads, batch_invariant;
    bool has_bias;
    double threshold = 2.5;
};

template <typename Args, typename T>
Args arguments(const Experts& all, const Given<T>& given, std::vector<T>& out) {
    auto args = args_with<Args>(given.threads);
    args.call.batch_invariant = given.batch_invariant;
    args.x_dtype = sizeof(T) == sizeof(float) ? HB_FLOAT32 : HB_BFLOAT16;
    args.x = given.x.data(), args.M = given.M, args.N = all.N, args.K = all.K;
    args.codes = all.codes.data(), args.absmax = all.absmax.data();
    args.threshold = given.threshold, args.outlier_rule = given.rule, args.out = out.data();
    if (given.has_bias) args.bias = all.bias.data(), args.bias_dtype = HB_FLOAT32;
    return args;
}

template <typename Args>
void run(Args& args, hb_status (*workspace_of)(const Args*, int64_t*), hb_status (*entry)(const Args*)) {
    int64_t bytes = -1;
    EXPECT(workspace_of(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(entry(&args) == HB_OK, "M %d N %d K %d rule %d", (int)args.M, (int)args.N, (int)args.K,
           (int)args.outlier_rule);
}

template <typename T>
std::vector<T> together(const Experts& all, const Given<T>& given) {
    std::vector<T> out = poisoned<T>(given.M * all.N);
    auto args = arguments<hb_linear8_experts_args>(all, given, out);
    args.E = all.E, args.ends = given.ends.data();
    run(args, hb_linear8_experts_workspace, hb_linear8_experts);
    return out;
}

// What hb_linear8 gives for each expert's rows, put together.
template <typename T>
std::vector<T> one_by_one(const Experts& all, const Given<T>& given) {
    std::vector<T> out(static_cast<size_t>(given.M * all.N), T{});
    for (int64_t e = 0, begin = 0; e < all.E; begin = given.ends[static_cast<size_t>(e++)]) {
        const int64_t rows = given.ends[static_cast<size_t>(e)] - begin;
        if (rows == 0) continue;
        auto args = arguments<hb_linear8_args>(all, given, out);
        args.M = rows, args.call.threads = 1;
        args.x = given.x.data() + begin * all.K, args.out = out.data() + begin * all.N;
        args.codes += e * all.N * all.K, args.absmax += e * all.N;
        if (given.has_bias) args.bias = all.bias.data() + e * all.N;
        run(args, hb_linear8_workspace, hb_linear8);
    }
    return out;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T>
std::vector<T> values_of(int64_t count);
template <>
std::vector<float> values_of<float>(int64_t count) {
    return normal_values(count);
}
template <>
std::vector<uint16_t> values_of<uint16_t>(int64_t count) {
    return bfloats(normal_values(count));
}

// `behind`: rows that belong to no expert.
template <typename T>
void compare(const Experts& all, const std::vector<int64_t>& rows, int64_t behind, const char* what) {
    Given<T> given = {};
    for (const int64_t count : rows) given.ends.push_back((given.ends.empty() ? 0 : given.ends.back()) + count);
    given.M = (rows.empty() ? 0 : given.ends.back()) + behind;
    given.x = values_of<T>(given.M * all.K);
    given.has_bias = any_of({0, 1}) == 1;
    given.threshold = any_of({0, 1}) == 1 ? 2.5 : 0.0;
    for (const int64_t rule : kRules) {
        for (given.batch_invariant = 0; given.batch_invariant < 2; ++given.batch_invariant) {
            given.rule = rule;
            const std::vector<T> expected = one_by_one(all, given);
            for (const int64_t threads : {1, 3}) {
                given.threads = threads;
                EXPECT(same_bits(together(all, given), expected), "%s: E %d N %d K %d rule %d on %d threads", what,
                       (int)all.E, (int)all.N, (int)all.K, (int)rule, (int)threads);
            }
            given.threads = 1;
        }
    }
}

void compare_all(const Experts& all, const std::vector<int64_t>& rows, int64_t behind, const char* what) {
    compare<float>(all, rows, behind, what);
    compare<uint16_t>(all, rows, behind, what);
}

}  // namespace

TEST(rows_meet_their_own_experts_int8_matrices) {
    compare_all(Experts(1, 1, 1), {1}, 0, "one of everything");
    compare_all(Experts(4, 7, 33), {2, 0, 5, 1}, 0, "odd sizes");
    compare_all(Experts(5, 37, 192), {0, 0, 3, 0, 9}, 2, "rows behind the last end");
    compare_all(Experts(3, 70, 512), {0, 0, 0}, 4, "nothing but rows of nobody");
    compare_all(Experts(40, 16, 128), std::vector<int64_t>(40, 1), 0, "many experts");
    compare_all(Experts(4, 9, 0), {1, 2, 0, 4}, 1, "no input features");
    compare_all(Experts(0, 9, 32), {}, 3, "no experts");
    compare_all(Experts(3, 19, 64), {300, 1, 513}, 3, "passes of one expert");
    for (int round = 0; round < 10; ++round) {
        const Experts all(any_of({2, 8, 17}), any_of({3, 16, 45}), any_of({32, 64, 250, 576}));
        std::vector<int64_t> rows;
        for (int64_t e = 0; e < all.E; ++e) rows.push_back(any_of({0, 0, 1, 2, 4, 7, 40}));
        compare_all(all, rows, any_of({0, 0, 5}), "random");
    }
}

TEST(an_int8_expert_without_rows_is_not_read) {
    const Experts all(5, 128, 1024);
    const std::vector<int64_t> idle = {0, 2, 4};
    Hidden<int8_t> codes(all.codes);
    Hidden<float> absmax(all.absmax), bias(all.bias);
    EXPECT(codes.hide(5, idle) >= 3 * 100'000, "pages of codes");
    absmax.hide(5, idle), bias.hide(5, idle);
    for (const int64_t rule : kRules) {
        Given<uint16_t> given = {values_of<uint16_t>(3 * all.K), {0, 2, 2, 3, 3}, 3, rule, 1, 0, true};
        const std::vector<uint16_t> expected = one_by_one(all, given);
        std::vector<uint16_t> out = poisoned<uint16_t>(3 * all.N);
        given.threads = 2;
        auto args = arguments<hb_linear8_experts_args>(all, given, out);
        args.E = all.E, args.ends = given.ends.data();
        args.codes = codes.data(), args.absmax = absmax.data(), args.bias = bias.data();
        run(args, hb_linear8_experts_workspace, hb_linear8_experts);
        EXPECT(out == expected, "rule %d", (int)rule);
    }
}

TEST(ends_of_int8_experts_that_cannot_be_are_refused_and_nothing_is_written) {
    const Experts all(3, 7, 64);
    for (const std::vector<int64_t>& ends : {std::vector<int64_t>{2, 1, 6},
                                             {-1, 2, 6},
                                             {2, 4, 7},
                                             {0, std::numeric_limits<int64_t>::max(), 6},
                                             {std::numeric_limits<int64_t>::min(), 0, 0}}) {
        for (const int64_t rule : kRules) {
            const Given<float> given = {values_of<float>(6 * all.K), ends, 6, rule, 1, 1, false};
            std::vector<float> out = poisoned<float>(6 * all.N);
            auto args = arguments<hb_linear8_experts_args>(all, given, out);
            args.E = all.E, args.ends = given.ends.data();
            int64_t bytes = 0;
            EXPECT(hb_linear8_experts_workspace(&args, &bytes) == HB_OK, "workspace");
            const Workspace workspace(bytes);
            workspace.give_to(args.call);
            EXPECT(hb_linear8_experts(&args) == HB_BAD_EXPERTS, "%d %d %d", (int)ends[0], (int)ends[1], (int)ends[2]);
            for (const float value : out) EXPECT(memcmp(&value, "\xA5\xA5\xA5\xA5", 4) == 0, "written");
        }
    }
}
