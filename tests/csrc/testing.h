// The smallest test harness that serves: TEST registers a function, EXPECT counts and prints what fails. Also what the
// tests share: random values, poisoned outputs, workspaces, and the 16-bit floats in their slow and plain form.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "halfbyte.h"

namespace testing {

struct Registered {
    const char* name;
    void (*run)();
    Registered* next;
};
extern Registered* first_test;
extern int failures;

struct Registration {
    Registered entry;
    Registration(const char* name, void (*run)()) : entry{name, run, first_test} { first_test = &entry; }
};

#define TEST(name)                                                   \
    static void name();                                              \
    static ::testing::Registration name##_registration(#name, name); \
    static void name()

#define EXPECT(condition, ...)                                                       \
    do {                                                                             \
        if (!(condition)) {                                                          \
            ++::testing::failures;                                                   \
            if (::testing::failures < 50) {                                          \
                printf("%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
                printf(__VA_ARGS__);                                                 \
                printf("\n");                                                        \
            }                                                                        \
        }                                                                            \
    } while (0)

// Fresh values in every run; main prints the seed, and takes it back as its argument.
extern std::mt19937_64 generator;

inline std::vector<float> normal_values(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(generator);
    return values;
}

inline int64_t any_of(std::initializer_list<int64_t> choices) {
    return *(choices.begin() + std::uniform_int_distribution<size_t>(0, choices.size() - 1)(generator));
}

// `count` elements of T, every byte 0xA5: an output that is not written shows.
template <typename T>
std::vector<T> poisoned(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    if (count > 0) memset(values.data(), 0xA5, values.size() * sizeof(T));
    return values;
}

// Aligned scratch memory of exactly the asked size, so that a sanitizer sees one byte too many.
class Workspace {
  public:
    explicit Workspace(int64_t bytes) : bytes_(bytes) {
        const int64_t rounded = (bytes + HB_WORKSPACE_ALIGNMENT - 1) / HB_WORKSPACE_ALIGNMENT * HB_WORKSPACE_ALIGNMENT;
        data_ = bytes == 0 ? nullptr : aligned_alloc(HB_WORKSPACE_ALIGNMENT, static_cast<size_t>(rounded));
        if (data_ != nullptr) memset(data_, 0xFF, static_cast<size_t>(rounded));  // NaNs, if read as floats
    }
    ~Workspace() { free(data_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    void give_to(hb_call& call) const {
        call.workspace = data_;
        call.workspace_bytes = bytes_;
    }

  private:
    int64_t bytes_;
    void* data_;
};

template <typename Args>
Args args_with(int64_t threads = 1) {
    Args args;
    memset(&args, 0, sizeof args);
    args.call.struct_bytes = sizeof args;
    args.call.threads = threads;
    return args;
}

inline std::vector<float> table(int32_t which) {
    std::vector<float> values(256);
    values.resize(static_cast<size_t>(hb_table(which, values.data(), 256)));
    return values;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// A 16-bit float's value, by arithmetic on its fields: `fraction_bits` is 10 for float16 and 7 for bfloat16.
inline double value_of(uint16_t bits, int fraction_bits) {
    const int exponent_bits = 15 - fraction_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
        return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                             : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
    return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

// The nearest bfloat16 of a finite value.
inline uint16_t bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::vector<uint16_t> bfloats(const std::vector<float>& values) {
    std::vector<uint16_t> rounded;
    for (const float value : values) rounded.push_back(bfloat(value));
    return rounded;
}

// Whether the level that runs rounds decoded weights to bfloat16 where activations are.
inline bool multiplies_bfloat16() {
    const char* const level = hb_level();
    return level != nullptr && (strcmp(level, "amx") == 0 || strcmp(level, "avx512_bf16") == 0);
}

// Whether it multiplies 16-bit activations in fixed point, where shapes allow it: test_fixed.cpp has the definition.
inline bool multiplies_in_fixed_point() {
    const char* const level = hb_level();
    return level != nullptr && strcmp(level, "avx2") == 0;
}

inline double value_at(const std::vector<uint16_t>& values, int64_t index, int64_t dtype) {
    return value_of(values[static_cast<size_t>(index)], dtype == HB_FLOAT16 ? 10 : 7);
}

}  // namespace testing
