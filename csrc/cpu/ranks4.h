// The 4-bit formats by rank: the number of thresholds that a normalised value exceeds, or its magnitude where the
// format has a sign bit. What each rank stands for, from the tables of formats.h.
#pragma once

#include "formats.h"

namespace hb {

struct Nf4Ranks {
    static constexpr bool kHasSignBit = false;
    static constexpr int kThresholds = kNf4Thresholds.length;
    static constexpr float threshold(int index) { return kNf4Thresholds.at[index]; }
    static constexpr float value(int rank) { return kNf4Values.at[rank]; }
    static constexpr int code(int rank) { return kNf4CodeOfRank.at[rank]; }
};

struct Fp4Ranks {
    static constexpr bool kHasSignBit = true;
    static constexpr int kThresholds = kFp4Thresholds.length;
    static constexpr float threshold(int index) { return kFp4Thresholds.at[index]; }
    static constexpr float value(int rank) { return kFp4Values.at[kFp4CodeOfRank.at[rank]]; }
    static constexpr int code(int rank) { return kFp4CodeOfRank.at[rank]; }
};

}  // namespace hb
