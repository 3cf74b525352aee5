// 4-bit codes against a scalar oracle that reads the tables from the library and does everything else the long way.
#include "testing.h"

using namespace testing;

namespace {

struct Quantized {
    std::vector<uint8_t> packed;
    std::vector<float> absmax;
};

int code_of(int64_t format, float normalised) {
    const auto thresholds = table(format == HB_NF4 ? HB_TABLE_NF4_THRESHOLDS : HB_TABLE_FP4_THRESHOLDS);
    const auto ranks = table(format == HB_NF4 ? HB_TABLE_NF4_RANKS : HB_TABLE_FP4_RANKS);
    const float ranked = format == HB_NF4 ? normalised : std::fabs(normalised);
    size_t rank = 0;
    for (const float threshold : thresholds) rank += ranked > threshold ? 1 : 0;
    return static_cast<int>(ranks[rank]) + (format == HB_FP4 && normalised < 0 ? 8 : 0);
}

Quantized oracle(const std::vector<float>& x, int64_t format, int64_t blocksize) {
    const int64_t n = static_cast<int64_t>(x.size());
    Quantized result;
    std::vector<int> codes;
    for (int64_t first = 0; first < n; first += blocksize) {
        const int64_t end = std::min(first + blocksize, n);
        float absmax = 0;
        for (int64_t i = first; i < end; ++i) absmax = std::max(absmax, std::fabs(x[static_cast<size_t>(i)]));
        for (int64_t i = first; i < end; ++i) {
            const float reciprocal = absmax == 0 ? 0.0f : 1.0f / absmax;
            codes.push_back(code_of(format, x[static_cast<size_t>(i)] * reciprocal));
        }
        result.absmax.push_back(absmax);
    }
    if (codes.size() % 2 != 0) codes.push_back(code_of(format, 0.0f));
    for (size_t i = 0; i < codes.size(); i += 2) {
        result.packed.push_back(static_cast<uint8_t>(codes[i] * 16 + codes[i + 1]));
    }
    return result;
}

Quantized quantize(const void* x, int64_t dtype, int64_t n, int64_t format, int64_t blocksize, int64_t threads = 1) {
    Quantized result = {poisoned<uint8_t>((n + 1) / 2), poisoned<float>(ceil_div(n, blocksize))};
    auto args = args_with<hb_quantize4_args>(threads);
    args.x = x, args.x_dtype = dtype, args.n = n, args.format = format, args.blocksize = blocksize;
    args.packed = result.packed.data(), args.absmax = result.absmax.data();
    EXPECT(hb_quantize4(&args) == HB_OK, "n %lld", static_cast<long long>(n));
    return result;
}

const std::initializer_list<int64_t> kSizes = {1, 2, 31, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 100003};

}  // namespace

TEST(codes_and_maxima_are_the_oracles) {
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        for (int64_t blocksize = 32; blocksize <= 4096; blocksize *= 2) {
            for (const int64_t n : kSizes) {
                std::vector<float> x = normal_values(n, 0.02f);
                if (n > 200) std::fill(x.begin() + 64, x.begin() + 192, 0.0f);
                const Quantized expected = oracle(x, format, blocksize);
                for (const int64_t threads : {1, 3}) {
                    const Quantized got = quantize(x.data(), HB_FLOAT32, n, format, blocksize, threads);
                    EXPECT(got.packed == expected.packed, "codes, format %d, blocksize %d, n %d, threads %d",
                           (int)format, (int)blocksize, (int)n, (int)threads);
                    EXPECT(got.absmax == expected.absmax, "absmax, blocksize %d, n %d", (int)blocksize, (int)n);
                }
            }
        }
    }
}

TEST(sixteen_bit_inputs_count_as_their_values) {
    for (const int64_t dtype : {HB_FLOAT16, HB_BFLOAT16}) {
        std::vector<uint16_t> x(65536);
        std::vector<float> values(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<uint16_t>(i);
            double value = value_at(x, static_cast<int64_t>(i), dtype);
            if (!std::isfinite(value) || std::fabs(value) < 1e-30) x[i] = 0, value = 0;
            values[i] = static_cast<float>(value);
        }
        const Quantized expected = oracle(values, HB_NF4, 4096);
        const Quantized got = quantize(x.data(), dtype, 65536, HB_NF4, 4096);
        EXPECT(got.packed == expected.packed, "codes of dtype %d", (int)dtype);
        EXPECT(got.absmax == expected.absmax, "absmax of dtype %d", (int)dtype);
    }
}

TEST(hostile_values_stay_in_their_block) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> x = normal_values(4 * 64);
    x[3] = nan;
    x[64 + 7] = -infinity;
    std::fill(x.begin() + 128, x.begin() + 192, 1e-42f);  // subnormal: no reciprocal, yet full resolution
    x[128] = -2e-42f;
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        const Quantized got = quantize(x.data(), HB_FLOAT32, 256, format, 64);
        EXPECT(std::isnan(got.absmax[0]), "%g", static_cast<double>(got.absmax[0]));
        EXPECT(got.absmax[1] == infinity, "%g", static_cast<double>(got.absmax[1]));
        EXPECT(got.absmax[2] == 2e-42f, "%g", static_cast<double>(got.absmax[2]));
        const auto values = table(format == HB_NF4 ? HB_TABLE_NF4 : HB_TABLE_FP4);
        EXPECT(values[got.packed[64] >> 4] == -1.0f, "the largest of a subnormal block");
        EXPECT(std::fabs(values[got.packed[64] & 15] - 0.5f) < 0.07f, "half of it");
        const std::vector<float> last(x.begin() + 192, x.end());
        EXPECT(got.absmax[3] == oracle(last, format, 64).absmax[0], "the block after them");
    }
}

TEST(dequantized_values_are_one_product_and_one_rounding) {
    for (const int64_t format : {HB_NF4, HB_FP4}) {
        const auto values = table(format == HB_NF4 ? HB_TABLE_NF4 : HB_TABLE_FP4);
        for (const int64_t n : kSizes) {
            const int64_t blocksize = any_of({32, 64, 256, 4096});
            std::vector<uint8_t> packed(static_cast<size_t>((n + 1) / 2));
            for (uint8_t& byte : packed) byte = static_cast<uint8_t>(generator());
            const std::vector<float> absmax = normal_values(ceil_div(n, blocksize));  // negative ones too
            for (const int64_t dtype : {HB_FLOAT32, HB_FLOAT16, HB_BFLOAT16}) {
                std::vector<float> floats = poisoned<float>(dtype == HB_FLOAT32 ? n : 0);
                std::vector<uint16_t> halves = poisoned<uint16_t>(dtype == HB_FLOAT32 ? 0 : n);
                auto args = args_with<hb_dequantize4_args>(any_of({1, 2, 5}));
                args.packed = packed.data(), args.absmax = absmax.data(), args.n = n, args.format = format;
                args.blocksize = blocksize, args.out_dtype = dtype;
                args.out = dtype == HB_FLOAT32 ? static_cast<void*>(floats.data()) : halves.data();
                EXPECT(hb_dequantize4(&args) == HB_OK, "n %d", (int)n);
                for (int64_t i = 0; i < n; ++i) {
                    const int byte = packed[static_cast<size_t>(i / 2)];
                    const float exact = values[static_cast<size_t>(i % 2 == 0 ? byte / 16 : byte % 16)] *
                                        absmax[static_cast<size_t>(i / blocksize)];
                    if (dtype == HB_FLOAT32) {
                        EXPECT(floats[static_cast<size_t>(i)] == exact, "value %d of %d", (int)i, (int)n);
                    } else {
                        // The nearest of the neighbours: no other 16-bit value may be closer.
                        const uint16_t bits = halves[static_cast<size_t>(i)];
                        const double error = std::fabs(value_at(halves, i, dtype) - static_cast<double>(exact));
                        for (const int step : {-1, 1}) {
                            const uint16_t other = static_cast<uint16_t>(bits + step);
                            const double value = value_of(other, dtype == HB_FLOAT16 ? 10 : 7);
                            EXPECT(!(std::fabs(value - static_cast<double>(exact)) < error), "value %d of %d", (int)i,
                                   (int)n);
                        }
                    }
                }
            }
        }
    }
}

TEST(absmax_goes_through_the_nearest_code_of_the_map) {
    const auto map = table(HB_TABLE_DYNAMIC);
    for (const int64_t count : {1, 255, 256, 257, 1000, 70000}) {
        const int64_t blocksize = any_of({1, 7, 256, 1000});
        std::vector<float> absmax = normal_values(count);
        for (float& value : absmax) value = std::fabs(value) + 0.01f;
        const float offset = 0.8f;
        std::vector<uint8_t> codes = poisoned<uint8_t>(count);
        std::vector<float> nested = poisoned<float>(ceil_div(count, blocksize));
        auto quantize_args = args_with<hb_quantize_absmax_args>(any_of({1, 4}));
        quantize_args.absmax = absmax.data(), quantize_args.blocks = count, quantize_args.offset = &offset;
        quantize_args.nested_blocksize = blocksize, quantize_args.codes = codes.data();
        quantize_args.nested_absmax = nested.data();
        EXPECT(hb_quantize_absmax(&quantize_args) == HB_OK, "count %d", (int)count);

        std::vector<float> back = poisoned<float>(count);
        auto args = args_with<hb_dequantize_absmax_args>(any_of({1, 4}));
        args.codes = codes.data(), args.blocks = count, args.nested_absmax = nested.data(), args.offset = &offset;
        args.nested_blocksize = blocksize, args.absmax = back.data();
        EXPECT(hb_dequantize_absmax(&args) == HB_OK, "count %d", (int)count);
        for (int64_t i = 0; i < count; ++i) {
            const size_t at = static_cast<size_t>(i);
            const float scale = nested[static_cast<size_t>(i / blocksize)];
            const float product = map[codes[at]] * scale;
            EXPECT(back[at] == product + offset, "absmax %d: rounded after the product and after the sum", (int)i);
            if (scale == 0) continue;  // a block of nothing but the offset: any code stands for it
            const double target = (static_cast<double>(absmax[at]) - offset) / scale;
            const double error = std::fabs(map[codes[at]] - target);
            for (const float other : map) EXPECT(error <= std::fabs(other - target) + 1e-6, "absmax %d", (int)i);
        }
    }
}

TEST(absmax_codes_change_exactly_at_the_midpoints) {
    const auto midpoints = table(HB_TABLE_DYNAMIC_MIDPOINTS);
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> values = {1.0f,    -1.0f,  0.0f,    -0.0f,   1e-30f,
                                 -1e-30f, 1e-42f, 2.4e-7f, -2.4e-7f};  // 1: their maximum
    for (const float midpoint : midpoints) {
        for (const float value : {std::nextafter(midpoint, -infinity), midpoint, std::nextafter(midpoint, infinity)}) {
            values.push_back(value);
        }
    }
    const int64_t count = static_cast<int64_t>(values.size());
    std::vector<uint8_t> codes = poisoned<uint8_t>(count);
    std::vector<float> nested = poisoned<float>(1);
    const float offset = 0;
    auto args = args_with<hb_quantize_absmax_args>();
    args.absmax = values.data(), args.blocks = count, args.offset = &offset, args.nested_blocksize = count;
    args.codes = codes.data(), args.nested_absmax = nested.data();
    EXPECT(hb_quantize_absmax(&args) == HB_OK, "count %d", (int)count);
    EXPECT(nested[0] == 1.0f, "%g", static_cast<double>(nested[0]));
    for (size_t i = 0; i < values.size(); ++i) {
        int below = 0;
        for (const float midpoint : midpoints) below += midpoint < values[i] ? 1 : 0;
        EXPECT(codes[i] == below, "value %g: code %d, not %d", static_cast<double>(values[i]), (int)codes[i], below);
    }
}
