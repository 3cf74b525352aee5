// The number formats for C++ and CUDA: the tables of quant/formats.py once more, compared with it by a test.
//
// Not here: how a tensor is cut into blocks (each operator) and what the tables mean (quant/formats.py says it).
#pragma once

#include <stdint.h>

namespace hb {

template <typename T, int Length>
struct Table {
    T at[Length];
    static constexpr int length = Length;
};

// clang-format off
constexpr Table<float, 16> kNf4Values = {{
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
}};
// Ascending; the code is the number of thresholds that a normalised value exceeds.
constexpr Table<float, 15> kNf4Thresholds = {{
    -0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f, -0.23460739850997925f,
    -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f, 0.120255246758461f, 0.2035212516784668f,
    0.2920137643814087f, 0.3893125355243683f, 0.5016634464263916f, 0.6427869200706482f, 0.8614784479141235f,
}};
constexpr Table<float, 16> kFp4Values = {{
    0.0f, 0.005208333488553762f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,
    0.0f, -0.005208333488553762f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f,
}};
// Of the magnitude; its rank goes through kFp4CodeOfRank, and a negative value adds 8.
constexpr Table<float, 7> kFp4Thresholds = {{
    0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f,
}};
constexpr Table<uint8_t, 8> kFp4CodeOfRank = {{0, 1, 6, 7, 4, 5, 2, 3}};
// The positive values of the dynamic 8-bit map below 1.
constexpr Table<float, 127> kDynamicMagnitudes = {{
    5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f, 0.00015625001f,
    0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f, 0.00083125f, 0.0009437501f,
    0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f, 0.0046562497f, 0.0052187503f,
    0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f, 0.00859375f, 0.009156249f, 0.00971875f,
    0.01140625f, 0.01421875f, 0.01703125f, 0.019843752f, 0.02265625f, 0.02546875f, 0.028281251f, 0.03109375f,
    0.03390625f, 0.036718752f, 0.03953125f, 0.042343747f, 0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f,
    0.05640625f, 0.059218753f, 0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f,
    0.07890625f, 0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f,
    0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734376f, 0.19140625f, 0.20546874f,
    0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f, 0.28984374f, 0.30390626f, 0.31796873f,
    0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f, 0.40234375f, 0.41640624f, 0.43046874f,
    0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f, 0.5148437f, 0.5289062f, 0.54296875f, 0.5570313f,
    0.5710938f, 0.58515626f, 0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, 0.68359375f,
    0.6976563f, 0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, 0.79609376f, 0.8101562f,
    0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f, 0.9085938f, 0.92265624f, 0.93671876f,
    0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f,
}};
// clang-format on

// What a 4-bit table is multiplied by before it is rounded to a 16-bit dtype, where sums are scaled and not the table.
// Chosen so that little is rounded: NF4 values then are off by 0.37 (bfloat16) and 0.31 (float16) of what those of a
// table are that is scaled by absmax first, as a root of the mean square; FP4 values are exact.
constexpr float kNf4LiftInBfloat16 = 1.43701171875f;
constexpr float kNf4LiftInFloat16 = 1.3662109375f;
constexpr float kFp4Lift = 1.03125f;

constexpr Table<uint8_t, 16> make_nf4_code_of_rank() {
    Table<uint8_t, 16> codes{};
    for (int rank = 0; rank < 16; ++rank) codes.at[rank] = static_cast<uint8_t>(rank);
    return codes;
}
constexpr Table<uint8_t, 16> kNf4CodeOfRank = make_nf4_code_of_rank();

// Codes of the value zero: what pads an odd count.
constexpr uint8_t kNf4Zero = 7;
constexpr uint8_t kFp4Zero = 0;

constexpr Table<float, 256> make_dynamic_values() {
    Table<float, 256> values{};
    for (int i = 0; i < 127; ++i) {
        values.at[126 - i] = -kDynamicMagnitudes.at[i];
        values.at[128 + i] = kDynamicMagnitudes.at[i];
    }
    values.at[127] = 0.0f;
    values.at[255] = 1.0f;
    return values;
}
constexpr Table<float, 256> kDynamicValues = make_dynamic_values();

constexpr Table<float, 255> make_dynamic_midpoints() {
    Table<float, 255> midpoints{};
    for (int i = 0; i < 255; ++i) midpoints.at[i] = (kDynamicValues.at[i] + kDynamicValues.at[i + 1]) * 0.5f;
    return midpoints;
}
constexpr Table<float, 255> kDynamicMidpoints = make_dynamic_midpoints();

// The tables in int8, for products with int8 activations: round(unit * value), the unit being the one up to 127 with
// the smallest squared error in normally distributed weights.
constexpr float kNf4Int8Unit = 112.0f, kFp4Int8Unit = 120.0f;
template <typename Code>
constexpr Table<Code, 16> make_integer_table(const Table<float, 16>& values, float unit) {
    Table<Code, 16> codes{};
    for (int i = 0; i < 16; ++i) {
        const float scaled = values.at[i] * unit;
        codes.at[i] = static_cast<Code>(scaled < 0 ? scaled - 0.5f : scaled + 0.5f);
    }
    return codes;
}
constexpr Table<int8_t, 16> kNf4Int8 = make_integer_table<int8_t>(kNf4Values, kNf4Int8Unit);
constexpr Table<int8_t, 16> kFp4Int8 = make_integer_table<int8_t>(kFp4Values, kFp4Int8Unit);

// The tables in 16-bit fixed point, of 12 bits and a sign: round(unit * value). NF4's unit is the one below 2^12 with
// the smallest squared error in normally distributed weights, 1.1e-4 of their norm; FP4 is exact, being 192nds.
constexpr float kNf4FixedUnit = 4075.0f, kFp4FixedUnit = 4032.0f;
constexpr int32_t kLargestFixedWeight = static_cast<int32_t>(kNf4FixedUnit);
constexpr Table<int16_t, 16> kNf4Fixed = make_integer_table<int16_t>(kNf4Values, kNf4FixedUnit);
constexpr Table<int16_t, 16> kFp4Fixed = make_integer_table<int16_t>(kFp4Values, kFp4FixedUnit);

constexpr int64_t kSmallestBlocksize = 32;
constexpr int64_t kLargestBlocksize = 4096;
constexpr float kInt8Max = 127.0f;
// Heads of keys and values in int8 that hold nothing this large are kept as zeros: no scale is subnormal.
constexpr float kSmallestStored = 0x1p-64f;
// Two int8 codes multiplied stand for this times both maxima.
constexpr float kInt8ProductScale = static_cast<float>(1.0 / (127.0 * 127.0));
// What a code of such a table times an int8 code of x stands for, times both maxima: of NF4, of FP4.
constexpr Table<float, 2> kInt8Steps = {{1.0f / (kInt8Max * kNf4Int8Unit), 1.0f / (kInt8Max * kFp4Int8Unit)}};
// Maxima below kSmallestDivisor are scaled up, exactly, before they are divided by.
constexpr float kSmallestDivisor = 0x1p-100f;
constexpr float kSubnormalScale = 0x1p100f;

// The search for a block's scale first tries these times its largest magnitude, and for a format without a sign bit
// their negatives after them; then the best one's scale plus each of the steps.
constexpr int kSearchCount = 16;
constexpr Table<float, 2 * kSearchCount> make_search_factors() {
    Table<float, 2 * kSearchCount> factors{};
    for (int i = 0; i < kSearchCount; ++i) {
        factors.at[i] = static_cast<float>(20 + 5 * i) / 64.0f;
        factors.at[kSearchCount + i] = -factors.at[i];
    }
    return factors;
}
constexpr Table<float, 2 * kSearchCount> kSearchFactors = make_search_factors();
constexpr Table<float, kSearchCount> make_search_steps() {
    Table<float, kSearchCount> steps{};
    for (int i = 0; i < kSearchCount; ++i) steps.at[i] = static_cast<float>(2 * i - 15) / 256.0f;
    return steps;
}
constexpr Table<float, kSearchCount> kSearchSteps = make_search_steps();
// A scale that is found must lower the squared error by more, in units of the largest magnitude's square: less may be
// the rounding of the division by it, and a block that its maximum decodes exactly must keep it.
constexpr float kSearchMargin = 0x1p-30f;

}  // namespace hb
