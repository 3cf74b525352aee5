// Decoding: a table lookup per byte, then one float32 product per value.
#include "decode4.h"

#include <string.h>

#include "clones.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

namespace {

constexpr PairTable make_pairs(const Table<float, 16>& values) {
    PairTable table{};
    for (int byte = 0; byte < 256; ++byte) {
        table.pairs[byte][0] = values.at[byte >> 4];
        table.pairs[byte][1] = values.at[byte & 15];
    }
    return table;
}

constexpr PairTable kNf4Pairs = make_pairs(kNf4Values);
constexpr PairTable kFp4Pairs = make_pairs(kFp4Values);

// Values inside one block: any start, at least one.
HB_INLINE void decode_run(const PairTable& table, const uint8_t* packed, float absmax, int64_t first, int64_t count,
                          float* out) {
    const uint8_t* bytes = packed + first / 2;
    const int64_t lead = first % 2;  // 1: start with the second code of a byte
    if (lead == 1) out[0] = table.pairs[*bytes++][1];
    const int64_t whole = (count - lead) / 2;
    for (int64_t i = 0; i < whole; ++i) memcpy(out + lead + 2 * i, table.pairs[bytes[i]], sizeof table.pairs[0]);
    if (lead + 2 * whole < count) out[count - 1] = table.pairs[bytes[whole]][0];
    for (int64_t i = 0; i < count; ++i) out[i] *= absmax;
}

HB_CLONES(void, decode_blocks,
          (const PairTable& table, const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t first,
           int64_t count, float* out)) {
    const int64_t end = first + count;
    while (first < end) {
        const int64_t block_end = (first / blocksize + 1) * blocksize;
        const int64_t run = (block_end < end ? block_end : end) - first;
        decode_run(table, packed, *absmax++, first, run, out);
        out += run;
        first += run;
    }
}

}  // namespace

const PairTable& pair_table(int64_t format) {
    return format == HB_NF4 ? kNf4Pairs : kFp4Pairs;
}

void decode4(const PairTable& table, const uint8_t* packed, const float* absmax, int64_t blocksize, int64_t first,
             int64_t count, float* out) {
    decode_blocks(table, packed, absmax, blocksize, first, count, out);
}

}  // namespace hb
