// What the tests of both 4-bit matmuls share: a random weight, and a call with exact-size buffers and a workspace full
// of NaNs.
#pragma once

#include "testing.h"

namespace testing {

struct Weight {
    int64_t N, K, format, blocksize, nested_blocksize;
    std::vector<uint8_t> packed, absmax_codes;
    std::vector<float> absmax, nested_absmax;
    float offset;

    Weight(int64_t n, int64_t k, bool nested) : Weight(n, k, nested, any_of({32, 64, 256})) {}
    Weight(int64_t n, int64_t k, bool nested, int64_t values_per_block)
        : N(n),
          K(k),
          format(any_of({HB_NF4, HB_FP4})),
          blocksize(values_per_block),
          nested_blocksize(nested ? any_of({3, 256}) : 0),
          offset(0.75f) {
        packed.resize(static_cast<size_t>((N * K + 1) / 2));
        for (uint8_t& byte : packed) byte = static_cast<uint8_t>(generator());
        const int64_t blocks = ceil_div(N * K, blocksize);
        absmax = normal_values(blocks);
        if (!nested) return;
        nested_absmax = normal_values(ceil_div(blocks, nested_blocksize));
        absmax_codes.resize(static_cast<size_t>(blocks));
        const auto map = table(HB_TABLE_DYNAMIC);
        for (int64_t b = 0; b < blocks; ++b) {
            absmax_codes[static_cast<size_t>(b)] = static_cast<uint8_t>(generator());
            const float product =
                map[absmax_codes[static_cast<size_t>(b)]] * nested_absmax[static_cast<size_t>(b / nested_blocksize)];
            absmax[static_cast<size_t>(b)] = product + offset;
        }
    }

    size_t code(int64_t n, int64_t k) const {
        const int64_t i = n * K + k;
        const int byte = packed[static_cast<size_t>(i / 2)];
        return static_cast<size_t>(i % 2 == 0 ? byte / 16 : byte % 16);
    }
    double at(int64_t n, int64_t k) const {
        static const auto nf4 = table(HB_TABLE_NF4);
        static const auto fp4 = table(HB_TABLE_FP4);
        const float value = (format == HB_NF4 ? nf4 : fp4)[code(n, k)];
        return value * absmax[static_cast<size_t>((n * K + k) / blocksize)];
    }
};

// T: float, or uint16_t for bfloat16.
template <typename T>
hb_linear4_args linear4_arguments(const Weight& w, const std::vector<T>& x, int64_t M, const std::vector<float>* bias,
                                  std::vector<T>& out, int64_t threads, int64_t batch_invariant = 1) {
    auto args = args_with<hb_linear4_args>(threads);
    args.call.batch_invariant = batch_invariant;
    args.x_dtype = sizeof(T) == sizeof(float) ? HB_FLOAT32 : HB_BFLOAT16;
    args.x = x.data(), args.M = M, args.N = w.N, args.K = w.K, args.packed = w.packed.data(), args.format = w.format;
    args.blocksize = w.blocksize, args.out = out.data();
    args.absmax = w.absmax.data();
    if (!w.absmax_codes.empty()) {
        args.absmax = w.absmax_codes.data(), args.nested_absmax = w.nested_absmax.data(), args.offset = &w.offset;
        args.nested_blocksize = w.nested_blocksize;
    }
    if (bias != nullptr) args.bias = bias->data(), args.bias_dtype = HB_FLOAT32;
    return args;
}

struct Linear4Entry {
    hb_status (*workspace)(const hb_linear4_args*, int64_t*);
    hb_status (*run)(const hb_linear4_args*);
};

template <typename T>
std::vector<T> run_linear4(const Linear4Entry& entry, const Weight& w, const std::vector<T>& x, int64_t M,
                           const std::vector<float>* bias, int64_t threads, int64_t batch_invariant = 1) {
    std::vector<T> out = poisoned<T>(M * w.N);
    auto args = linear4_arguments(w, x, M, bias, out, threads, batch_invariant);
    int64_t bytes = -1;
    EXPECT(entry.workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    EXPECT(entry.run(&args) == HB_OK, "M %d N %d K %d", (int)M, (int)w.N, (int)w.K);
    return out;
}

}  // namespace testing
