// Decoded weights in portable C++: four lanes, which compilers map to whatever the processor has.
#include "decoded_kernel.h"
#include "formats.h"

namespace hb {

namespace {

struct Baseline {
    using Value = float;
    using Vector = float __attribute__((vector_size(16), may_alias, aligned(4)));
    using Sum = Vector;
    struct Table {
        float at[16];
    };
    static constexpr bool kIsInt8 = false;
    static constexpr bool kScalesSums = false;
    static constexpr int64_t kGroup = 8;
    static constexpr int kRows = 2;
    static constexpr int kRowsByFour = 2;
    static constexpr int kFewRows = 2;
    static constexpr int kRowsWithoutTile = 2;

    static HB_INLINE float value(float x) { return x; }
    static HB_INLINE Vector zero() { return Vector{}; }
    static HB_INLINE Vector load(const float* values) { return *reinterpret_cast<const Vector*>(values); }
    static HB_INLINE void store(float* to, Vector values) { *reinterpret_cast<Vector*>(to) = values; }
    static HB_INLINE Vector dot(Vector sum, Vector a, Vector b) { return sum + a * b; }

    static HB_INLINE Table table(const float* values) {
        Table made;
        memcpy(made.at, values, sizeof made.at);
        return made;
    }
    static HB_INLINE Table scaled(const Table& base, float absmax) {
        Table made;
        for (int i = 0; i < 16; ++i) made.at[i] = base.at[i] * absmax;
        return made;
    }
    static HB_INLINE void decode(const uint8_t* bytes, const Table& table, Vector& high, Vector& low) {
        for (int i = 0; i < 4; ++i) {
            high[i] = table.at[bytes[i] >> 4];
            low[i] = table.at[bytes[i] & 15];
        }
    }
    static HB_INLINE void add_lanes(const Vector* sums, float* out) {
        for (int n = 0; n < kWeightRows; ++n) out[n] = (sums[n][0] + sums[n][2]) + (sums[n][1] + sums[n][3]);
    }
};

// An int8 code is a value; its vectors keep the natural order.
struct BaselineInt8 : Baseline {
    static constexpr bool kIsInt8 = true;
    static HB_INLINE void decode(const uint8_t* bytes, const Table&, Vector& first, Vector& second) {
        for (int i = 0; i < 4; ++i) {
            first[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
            second[i] = static_cast<float>(static_cast<int8_t>(bytes[i + 4]));
        }
    }
};

}  // namespace

const DecodedVariants kDecodedBaseline = {decoded_kernels<Baseline>(), decoded_kernels<BaselineInt8>()};

}  // namespace hb
