// The 4-bit matmul with int8 activations in plain loops, for every shape: blocks may cross rows and end anywhere.
//
// A weight row is decoded into int8 codes and cut where a group of x or a block of the weight ends. Each piece's sum is
// an exact integer, and pieces are added up in float32 in their order: the bits are those of every other way.
#include <string.h>

#include <algorithm>

#include "checks.h"
#include "clones.h"
#include "linear4_int8.h"

namespace hb {

namespace {

HB_INLINE int32_t dot(const int8_t* a, const int8_t* b, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<int16_t>(a[i]) * static_cast<int16_t>(b[i]);
    return sum;
}

struct Int8Pairs {
    int8_t at[256][2];
};

constexpr Int8Pairs make_pairs(const Table<int8_t, 16>& codes) {
    Int8Pairs pairs{};
    for (int byte = 0; byte < 256; ++byte) {
        pairs.at[byte][0] = codes.at[byte >> 4];
        pairs.at[byte][1] = codes.at[byte & 15];
    }
    return pairs;
}

constexpr Int8Pairs kNf4Pairs = make_pairs(kNf4Int8);
constexpr Int8Pairs kFp4Pairs = make_pairs(kFp4Int8);

// Codes [first, first + count) of the flattened weight, at least one.
void decode_codes(const hb_linear4_args& a, int64_t first, int64_t count, int8_t* out) {
    const Int8Pairs& pairs = a.format == HB_NF4 ? kNf4Pairs : kFp4Pairs;
    const uint8_t* bytes = a.packed + first / 2;
    if (first % 2 == 1) *out++ = pairs.at[*bytes++][1], --count;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) memcpy(out + i, pairs.at[bytes[i / 2]], 2);
    if (i < count) out[i] = pairs.at[bytes[i / 2]][0];
}

// Columns [k, k + count) of a weight row, inside one group of x and one block, against all rows of x.
HB_CLONES(void, add_piece,
          (const Int8Job& job, const int8_t* weights, int64_t k, int64_t count, float absmax, float* totals)) {
    const int8_t* codes = job.codes + k;
    const float* scale = job.scales + k / kGroupValues;
    for (int64_t row = 0; row < job.rows; ++row, codes += job.stride, scale += job.groups) {
        const int32_t sum =
            count == kGroupValues ? dot(codes, weights + k, kGroupValues) : dot(codes, weights + k, count);
        const float factor = absmax * *scale;
        totals[row] += static_cast<float>(sum) * factor;
    }
}

struct Parts {
    int64_t codes, absmax, totals, sums, end;  // where each begins, in bytes

    explicit Parts(const hb_linear4_args& a) {
        const int64_t floats = sizeof(float), rows = std::min(a.M, kInt8Rows);
        codes = 0;
        absmax = round_up(a.K, 64);
        totals = absmax + round_up((a.K / a.blocksize + 2) * floats, 64);
        sums = totals + round_up(rows * kPlainColumns * floats, 64);
        end = sums + kPlainColumns * floats;
    }
};

}  // namespace

int64_t plain_bytes(const hb_linear4_args& a) {
    return round_up(Parts(a).end, 64);
}

void run_plain(const Int8Job& job, int64_t begin, int64_t end, char* scratch) {
    const hb_linear4_args& a = *job.args;
    const Parts parts(a);
    int8_t* const codes = reinterpret_cast<int8_t*>(scratch + parts.codes);
    float* const absmax = reinterpret_cast<float*>(scratch + parts.absmax);
    float* const totals = reinterpret_cast<float*>(scratch + parts.totals);
    float* const sums = reinterpret_cast<float*>(scratch + parts.sums);
    for (int64_t n = begin; n < end; n += kPlainColumns) {
        const int64_t columns = std::min(kPlainColumns, end - n);
        std::fill_n(totals, columns * job.rows, 0.0f);
        for (int64_t i = 0; i < columns && a.K > 0; ++i) {
            const int64_t first = (n + i) * a.K, first_block = first / a.blocksize;
            load_absmax(job.absmax, first_block, (first + a.K - 1) / a.blocksize - first_block + 1, absmax);
            decode_codes(a, first, a.K, codes);
            for (int64_t k = 0; k < a.K;) {
                const int64_t block = (first + k) / a.blocksize;
                const int64_t next =
                    std::min({(k / kGroupValues + 1) * kGroupValues, (block + 1) * a.blocksize - first, a.K});
                add_piece(job, codes, k, next - k, absmax[block - first_block], totals + i * job.rows);
                k = next;
            }
        }
        for (int64_t row = 0; row < job.rows; ++row) {
            for (int64_t i = 0; i < columns; ++i) sums[i] = totals[i * job.rows + row];
            finish_int8(job, row, n, columns, sums);
        }
    }
}

}  // namespace hb
