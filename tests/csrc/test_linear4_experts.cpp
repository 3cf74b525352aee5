// The 4-bit matmul of rows with their experts' matrices against hb_linear4 on each expert and matrix alone: the same
// bits at every level, on any number of threads, however rows are spread over experts; and nothing of an expert without
// rows is read.
#include <algorithm>

#include "hidden.h"
#include "weight4.h"

using namespace testing;

namespace {

// The matrices of all experts, alike in everything but their values, and their tensors one behind the other.
struct Experts {
    int64_t E, P, N, K, packed_bytes;
    std::vector<Weight> matrices;  // [E * P]
    std::vector<uint8_t> packed, absmax_codes;
    std::vector<float> absmax, nested_absmax, offsets, bias;

    Experts(int64_t experts, int64_t parts, int64_t n, int64_t k, bool nested, int64_t padding = 0)
        : E(experts), P(parts), N(n), K(k), packed_bytes(ceil_div(n * k, 2) + padding), bias(normal_values(E * P * N)) {
        const Weight like(N, K, nested);
        while (static_cast<int64_t>(matrices.size()) < E * P) {
            Weight w(N, K, nested, like.blocksize);
            if (w.nested_blocksize != like.nested_blocksize) continue;
            w.format = like.format;
            w.offset = normal_values(1)[0];
            append(packed, w.packed), packed.resize(packed.size() + static_cast<size_t>(padding), 0xEE);
            append(absmax, w.absmax), append(absmax_codes, w.absmax_codes), append(nested_absmax, w.nested_absmax);
            offsets.push_back(w.offset);
            matrices.push_back(w);
        }
    }

    template <typename T>
    static void append(std::vector<T>& all, const std::vector<T>& some) {
        all.insert(all.end(), some.begin(), some.end());
    }

    template <typename T>
    hb_linear4_experts_args arguments(const std::vector<T>& x, const std::vector<int64_t>& ends, std::vector<T>& out,
                                      bool has_bias, int64_t threads, int64_t batch_invariant) const {
        auto args = args_with<hb_linear4_experts_args>(threads);
        args.call.batch_invariant = batch_invariant;
        args.x_dtype = sizeof(T) == sizeof(float) ? HB_FLOAT32 : HB_BFLOAT16;
        args.x = x.data(), args.M = static_cast<int64_t>(out.size()) / std::max<int64_t>(P * N, 1), args.E = E;
        args.P = P, args.N = N, args.K = K, args.ends = ends.data(), args.packed = packed.data();
        args.packed_bytes = packed_bytes, args.out = out.data(), args.absmax = absmax.data();
        const Weight& like = matrices[0];
        args.format = like.format, args.blocksize = like.blocksize;
        if (!absmax_codes.empty()) {
            args.absmax = absmax_codes.data(), args.nested_absmax = nested_absmax.data(), args.offset = offsets.data();
            args.nested_blocksize = like.nested_blocksize;
        }
        if (has_bias) args.bias = bias.data(), args.bias_dtype = HB_FLOAT32;
        return args;
    }
};

void run(hb_linear4_experts_args& args) {
    int64_t bytes = -1;
    EXPECT(hb_linear4_experts_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(hb_linear4_experts(&args) == HB_OK, "E %d P %d N %d K %d", (int)args.E, (int)args.P, (int)args.N,
           (int)args.K);
}

// What hb_linear4 gives for each expert's rows and each matrix, put together.
template <typename T>
std::vector<T> one_by_one(const Experts& all, const std::vector<T>& x, const std::vector<int64_t>& ends, int64_t M,
                          bool has_bias, int64_t batch_invariant) {
    std::vector<T> out(static_cast<size_t>(M * all.P * all.N), T{});
    for (int64_t e = 0, begin = 0; e < all.E; begin = ends[static_cast<size_t>(e++)]) {
        const int64_t rows = ends[static_cast<size_t>(e)] - begin;
        const std::vector<T> own(x.begin() + begin * all.K, x.begin() + (begin + rows) * all.K);
        for (int64_t p = 0; p < all.P && rows > 0; ++p) {
            const int64_t which = e * all.P + p;
            const std::vector<float> bias(all.bias.begin() + which * all.N, all.bias.begin() + (which + 1) * all.N);
            const std::vector<T> part =
                run_linear4({hb_linear4_workspace, hb_linear4}, all.matrices[static_cast<size_t>(which)], own, rows,
                            has_bias ? &bias : nullptr, 1, batch_invariant);
            for (int64_t m = 0; m < rows; ++m) {
                std::copy_n(part.begin() + m * all.N, all.N, out.begin() + ((begin + m) * all.P + p) * all.N);
            }
        }
    }
    return out;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

std::vector<int64_t> ends_of(const std::vector<int64_t>& rows) {
    std::vector<int64_t> ends;
    for (const int64_t count : rows) ends.push_back((ends.empty() ? 0 : ends.back()) + count);
    return ends;
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
    const std::vector<int64_t> ends = ends_of(rows);
    const int64_t M = ends.back() + behind;
    const std::vector<T> x = values_of<T>(M * all.K);
    for (const int64_t batch_invariant : {0, 1}) {
        const bool has_bias = any_of({0, 1}) == 1;
        const std::vector<T> expected = one_by_one(all, x, ends, M, has_bias, batch_invariant);
        for (const int64_t threads : {1, 3}) {
            std::vector<T> out = poisoned<T>(M * all.P * all.N);
            auto args = all.arguments(x, ends, out, has_bias, threads, batch_invariant);
            run(args);
            EXPECT(same_bits(out, expected), "%s: E %d P %d N %d K %d on %d threads", what, (int)all.E, (int)all.P,
                   (int)all.N, (int)all.K, (int)threads);
        }
    }
}

void compare_all(const Experts& all, const std::vector<int64_t>& rows, int64_t behind, const char* what) {
    compare<float>(all, rows, behind, what);
    compare<uint16_t>(all, rows, behind, what);
}

}  // namespace

TEST(rows_meet_their_own_experts_with_the_bits_of_products_alone) {
    compare_all(Experts(1, 1, 1, 1, false), {1}, 0, "one of everything");
    compare_all(Experts(4, 2, 7, 33, true, 3), {2, 0, 5, 1}, 0, "odd sizes");
    compare_all(Experts(5, 1, 37, 192, false), {0, 0, 3, 0, 9}, 2, "rows behind the last end");
    compare_all(Experts(3, 2, 70, 512, true), {0, 0, 0}, 4, "nothing but rows of nobody");
    compare_all(Experts(40, 2, 16, 128, true, 16), std::vector<int64_t>(40, 1), 0, "many experts");
    compare_all(Experts(3, 8, 5, 96, false), {17, 33, 3}, 1, "as many matrices as there may be");
    compare_all(Experts(4, 2, 9, 0, false), {1, 2, 0, 4}, 1, "no input features");
}

TEST(experts_with_many_rows_are_cut_into_passes_and_waves) {
    compare_all(Experts(3, 2, 19, 64, true), {300, 1, 513}, 3, "passes of one expert");
    compare_all(Experts(6, 1, 11, 70, false), {255, 2, 700, 0, 256, 300}, 0, "passes across waves");
    compare_all(Experts(1, 2, 6, 128, true), {1100}, 0, "one expert");
}

TEST(random_spreads_of_rows) {
    for (int round = 0; round < 20; ++round) {
        const Experts all(any_of({2, 8, 17}), any_of({1, 2}), any_of({3, 16, 45}), any_of({32, 64, 250, 576}),
                          any_of({0, 1}) == 1, any_of({0, 1, 8}));
        std::vector<int64_t> rows;
        for (int64_t e = 0; e < all.E; ++e) rows.push_back(any_of({0, 0, 1, 2, 4, 7, 40}));
        compare_all(all, rows, any_of({0, 0, 5}), "random");
    }
}

TEST(an_expert_without_rows_is_not_read) {
    for (const bool nested : {false, true}) {
        Experts all(5, 2, 128, 1024, nested);
        const std::vector<int64_t> ends = ends_of({0, 2, 0, 1, 0}), idle = {0, 2, 4};
        const std::vector<uint16_t> x = values_of<uint16_t>(3 * all.K);
        const std::vector<uint16_t> expected = one_by_one(all, x, ends, 3, true, 0);
        std::vector<uint16_t> out = poisoned<uint16_t>(3 * all.P * all.N);
        auto args = all.arguments(x, ends, out, true, 2, 0);
        Hidden<uint8_t> packed(all.packed), absmax_codes(all.absmax_codes);
        Hidden<float> absmax(all.absmax), bias(all.bias);
        EXPECT(packed.hide(5, idle) >= 3 * 100'000, "pages of codes");
        args.packed = packed.data(), args.bias = bias.data();
        if (nested) {
            args.absmax = absmax_codes.data();
            absmax_codes.hide(5, idle);
            const float nan = std::numeric_limits<float>::quiet_NaN();
            const int64_t own = static_cast<int64_t>(all.nested_absmax.size()) / 5;
            for (const int64_t e : idle) {
                std::fill_n(all.nested_absmax.begin() + e * own, own, nan);
                std::fill_n(all.offsets.begin() + e * all.P, all.P, nan);
            }
        } else {
            args.absmax = absmax.data();
            absmax.hide(5, idle);
        }
        run(args);
        EXPECT(out == expected, "nested %d", nested);
    }
}

TEST(ends_that_cannot_be_are_refused_and_nothing_is_written) {
    const Experts all(3, 2, 7, 64, false);
    const std::vector<float> x = normal_values(6 * all.K);
    for (const std::vector<int64_t>& ends : {std::vector<int64_t>{2, 1, 6},
                                             {-1, 2, 6},
                                             {2, 4, 7},
                                             {7, 7, 7},
                                             {0, std::numeric_limits<int64_t>::max(), 6},
                                             {std::numeric_limits<int64_t>::min(), 0, 0}}) {
        std::vector<float> out = poisoned<float>(6 * all.P * all.N);
        auto args = all.arguments(x, ends, out, false, 1, 1);
        int64_t bytes = 0;
        EXPECT(hb_linear4_experts_workspace(&args, &bytes) == HB_OK, "workspace");
        const Workspace workspace(bytes);
        workspace.give_to(args.call);
        EXPECT(hb_linear4_experts(&args) == HB_BAD_EXPERTS, "%d %d %d", (int)ends[0], (int)ends[1], (int)ends[2]);
        for (const float value : out) EXPECT(memcmp(&value, "\xA5\xA5\xA5\xA5", 4) == 0, "written");
    }
}
