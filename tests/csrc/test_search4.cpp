// The search for scales, against float64 and against what it must never do: give a block a larger squared error than
// its largest magnitude gives it. Codes at given scales, against the nearest table value.
#include "testing.h"

using namespace testing;

namespace {

std::vector<float> search(const std::vector<float>& x, int64_t format, int64_t blocksize, int64_t threads) {
    const int64_t n = static_cast<int64_t>(x.size());
    std::vector<float> scales = poisoned<float>(ceil_div(n, blocksize));
    auto args = args_with<hb_search4_args>(threads);
    args.x = x.data(), args.n = n, args.format = format, args.blocksize = blocksize, args.scales = scales.data();
    EXPECT(hb_search4(&args) == HB_OK, "n %d", (int)n);
    return scales;
}

std::vector<uint8_t> encode(const std::vector<float>& x, const std::vector<float>& scales, int64_t format,
                            int64_t blocksize, int64_t threads) {
    const int64_t n = static_cast<int64_t>(x.size());
    std::vector<uint8_t> packed = poisoned<uint8_t>((n + 1) / 2);
    auto args = args_with<hb_encode4_args>(threads);
    args.x = x.data(), args.n = n, args.format = format, args.blocksize = blocksize;
    args.scales = scales.data(), args.packed = packed.data();
    EXPECT(hb_encode4(&args) == HB_OK, "n %d", (int)n);
    return packed;
}

int code_at(const std::vector<uint8_t>& packed, int64_t index) {
    const int byte = packed[static_cast<size_t>(index / 2)];
    return index % 2 == 0 ? byte >> 4 : byte & 15;
}

// The squared error of values [first, end) at a scale, each at the nearest of the table's values.
double smallest_error(const std::vector<float>& x, int64_t first, int64_t end, double scale,
                      const std::vector<float>& values) {
    double sum = 0;
    for (int64_t i = first; i < end; ++i) {
        double smallest = std::numeric_limits<double>::infinity();
        for (const float value : values) {
            const double error = x[static_cast<size_t>(i)] - scale * static_cast<double>(value);
            smallest = std::min(smallest, error * error);
        }
        sum += smallest;
    }
    return sum;
}

}  // namespace

TEST(a_found_scale_is_never_worse_and_mostly_better) {
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        const auto values = table(format == HB_NF4 ? HB_TABLE_NF4 : HB_TABLE_FP4);
        for (const int64_t n : {1, 63, 64, 129, 4097, 20001}) {
            const int64_t blocksize = any_of({32, 64, 256, 4096});
            const std::vector<float> x = normal_values(n, 0.02f);
            const std::vector<float> scales = search(x, format, blocksize, any_of({1, 3}));
            EXPECT(search(x, format, blocksize, 2) == scales, "threads change nothing, n %d", (int)n);
            int64_t better = 0;
            for (int64_t first = 0; first < n; first += blocksize) {
                const int64_t end = std::min(first + blocksize, n);
                double absmax = 0;
                for (int64_t i = first; i < end; ++i) {
                    absmax = std::max(absmax, std::fabs(static_cast<double>(x[static_cast<size_t>(i)])));
                }
                const double plain = smallest_error(x, first, end, absmax, values);
                const double scale = scales[static_cast<size_t>(first / blocksize)];
                const double found = smallest_error(x, first, end, scale, values);
                EXPECT(found <= plain * (1 + 1e-5) + 1e-12, "block at %d: %g, not %g", (int)first, found, plain);
                better += found < 0.99 * plain ? 1 : 0;
            }
            EXPECT(n < 20000 || better * 2 > ceil_div(n, blocksize), "%d blocks are better, n %d", (int)better, (int)n);
        }
    }
}

TEST(codes_at_given_scales_stand_for_the_nearest_values) {
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        const auto values = table(format == HB_NF4 ? HB_TABLE_NF4 : HB_TABLE_FP4);
        for (const int64_t n : {1, 2, 65, 1001}) {
            const int64_t blocksize = any_of({32, 64, 256});
            const std::vector<float> x = normal_values(n);
            const std::vector<float> scales = normal_values(ceil_div(n, blocksize));  // negative ones too
            const std::vector<uint8_t> packed = encode(x, scales, format, blocksize, any_of({1, 2}));
            for (int64_t i = 0; i < n; ++i) {
                const double scale = scales[static_cast<size_t>(i / blocksize)];
                const double value = values[static_cast<size_t>(code_at(packed, i))];
                const double error = std::fabs(x[static_cast<size_t>(i)] - scale * value);
                const double best = std::sqrt(smallest_error(x, i, i + 1, scale, values));
                EXPECT(error <= best + 1e-5 * (std::fabs(scale) + 1), "value %d: %g, not %g", (int)i, error, best);
            }
        }
    }
}

TEST(scales_of_hostile_blocks) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> x = normal_values(6 * 64);
    x[3] = nan;
    x[64 + 7] = -infinity;
    std::fill(x.begin() + 128, x.begin() + 192, 0.0f);
    for (size_t i = 192; i < 256; ++i) x[i] *= 1e-42f;
    for (size_t i = 256; i < 320; ++i) x[i] = (i % 2 == 0 ? 1.0f : -1.0f) * std::numeric_limits<float>::max();
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        const std::vector<float> scales = search(x, format, 64, 1);
        EXPECT(std::isnan(scales[0]), "%g", static_cast<double>(scales[0]));
        EXPECT(scales[1] == infinity, "%g", static_cast<double>(scales[1]));
        EXPECT(scales[2] == 0.0f, "%g", static_cast<double>(scales[2]));
        EXPECT(scales[3] != 0.0f && std::fabs(scales[3]) < 1e-41f, "%g", static_cast<double>(scales[3]));
        EXPECT(scales[4] == std::numeric_limits<float>::max(), "%g", static_cast<double>(scales[4]));
        const std::vector<float> last(x.begin() + 320, x.end());
        EXPECT(scales[5] == search(last, format, 64, 1)[0], "the block after them");
        const std::vector<uint8_t> packed = encode(x, scales, format, 64, 1);
        const int zero = format == HB_NF4 ? 0x77 : 0x00;
        for (size_t i = 64; i < 96; ++i) EXPECT(packed[i] == zero, "byte %d of the block of zeros", (int)i);
    }
}
