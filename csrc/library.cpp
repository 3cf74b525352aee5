// What both libraries say about themselves: version, statuses as sentences, tables. No kernels.
#include <stdint.h>

#include "formats.h"
#include "halfbyte.h"

namespace {

constexpr const char* kStatusTexts[HB_STATUS_COUNT] = {
    "The call succeeded.",
    "A pointer is null although its tensor has elements or the entry needs it.",
    "The argument struct has another size than this library was built with; rebuild so that both come from one source.",
    "A dtype is unknown; accepted are float32, float16 and bfloat16, and for a cache of keys and values int8.",
    "The 4-bit format is unknown; accepted are nf4 and fp4.",
    ("The block size is not accepted; a 4-bit block holds a power of two from 32 to 4096 values, a nested block at "
     "least "
     "one."),
    ("A size is negative or too large, or sizes do not fit: a tensor has at most 2^46 elements, an attention head 1 to "
     "4096, and the number of kv heads divides that of heads."),
    "A pointer is not aligned to its element size.",
    "The workspace is not aligned to 64 bytes.",
    "The workspace is smaller than the entry's workspace function asks for.",
    "The number of threads is not accepted; it must be from 1 to 1024.",
    "An option is not accepted: an unknown outlier rule or kernel, or a threshold, scale, window or soft cap out of "
    "range.",
    "No CUDA device can be used: there is none, or its driver is older than the CUDA version of this library.",
    "This library holds no code for this GPU's architecture; build with its number in HALFBYTE_CUDA_ARCHITECTURES.",
    "The CUDA runtime refused to launch the kernel.",
    "A sequence has no rows, stands outside its block table, or names a block that the cache does not have.",
    "The experts' rows end where they cannot: each ends at or behind the one before it, and none behind the last row.",
    ("The kernel for Hopper needs a GPU of compute capability 9.0 and code for 90a in this library; accepted here is "
     "HALFBYTE_CUDA_KERNEL=mma."),
};

template <typename T, int Length>
int64_t copy(const hb::Table<T, Length>& table, float* out, int64_t room) {
    if (out == nullptr || room < Length) return -1;
    for (int i = 0; i < Length; ++i) out[i] = static_cast<float>(table.at[i]);
    return Length;
}

}  // namespace

extern "C" {

int32_t hb_abi_version(void) {
    return HB_ABI_VERSION;
}

const char* hb_status_text(hb_status status) {
    return status >= 0 && status < HB_STATUS_COUNT ? kStatusTexts[status] : "The status is unknown to this library.";
}

int64_t hb_table(int32_t table, float* out, int64_t room) {
    switch (table) {
        case HB_TABLE_NF4:
            return copy(hb::kNf4Values, out, room);
        case HB_TABLE_FP4:
            return copy(hb::kFp4Values, out, room);
        case HB_TABLE_NF4_THRESHOLDS:
            return copy(hb::kNf4Thresholds, out, room);
        case HB_TABLE_FP4_THRESHOLDS:
            return copy(hb::kFp4Thresholds, out, room);
        case HB_TABLE_NF4_RANKS:
            return copy(hb::kNf4CodeOfRank, out, room);
        case HB_TABLE_FP4_RANKS:
            return copy(hb::kFp4CodeOfRank, out, room);
        case HB_TABLE_DYNAMIC:
            return copy(hb::kDynamicValues, out, room);
        case HB_TABLE_DYNAMIC_MIDPOINTS:
            return copy(hb::kDynamicMidpoints, out, room);
        case HB_TABLE_NF4_INT8:
            return copy(hb::kNf4Int8, out, room);
        case HB_TABLE_FP4_INT8:
            return copy(hb::kFp4Int8, out, room);
        case HB_TABLE_INT8_STEPS:
            return copy(hb::kInt8Steps, out, room);
        default:
            return -1;
    }
}

}  // extern "C"
